/**
 * A stand-in for fsl that a test kills: starts a program with one helper task in it, says who they
 * are in one line of JSON, and waits. With the argument `share` another process holds the helper's
 * socket too, so that its end alone does not tell the helper.
 */
import { SOCK_STREAM } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import { libraryFd, preloadVariables, receivePreload } from "./preloaded.ts";

const LIFETIME_MS = 30_000;

const pair = new Int32Array(2);
sys.check(sys.socketpair(SOCK_STREAM, pair), "socketpair");
const [own = -1, theirs = -1] = pair;
const target = Bun.spawn(["sleep", "30"], {
  env: { ...process.env, ...preloadVariables(1) },
  stdio: ["ignore", "ignore", "inherit", theirs, libraryFd()],
});
const { helpers } = receivePreload(own);
const holder =
  process.argv[2] === "share"
    ? Bun.spawn(["sleep", "30"], { stdio: ["ignore", "ignore", "inherit", helpers[0]?.fd ?? -1] })
    : null;
console.log(JSON.stringify({ target: target.pid, helper: helpers[0]?.pid, holder: holder?.pid }));
await Bun.sleep(LIFETIME_MS);

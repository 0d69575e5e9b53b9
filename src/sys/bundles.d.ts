/**
 * A Worker's bundle in build/, imported `with { type: "file" }`: the path under which it can be
 * started.
 */
declare module "*.bundle.js" {
  const path: string;
  export default path;
}

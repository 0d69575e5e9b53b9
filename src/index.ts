/** The public API of fsl: everything that the command line uses, and nothing else. */
export { EXIT_CODES, type ErrorCode, type ErrorDetails, FslError, isFslError } from "./errors.ts";
export { type LoadHandle, type LoadMode, type LoadOptions, loadSnapshot } from "./load/loader.ts";
export {
  findLoads,
  type FoundLoad,
  refuseUnserved,
  resumeLoad,
  type ResumeHandle,
  type ResumeOptions,
  unbegunLoad,
} from "./load/recovery.ts";
export {
  type EagerOptions,
  helperTasksFor,
  type Logger,
  type OnError,
  type ServingOptions,
} from "./load/serving.ts";
export type { PageFailure } from "./load/fault-loop.ts";
export type { BlockPlan, LoadPlan, LoadWay } from "./load/plan.ts";
export type {
  FaultLatency,
  LoadProgress,
  LoadReport,
  LoadTimes,
  PageCounts,
} from "./load/report.ts";
export { openSnapshot, type OpenSnapshotOptions, type Snapshot } from "./snapshot/snapshot.ts";
export type { RAMBlock } from "./snapshot/mapped-ram.ts";
export type {
  CreatePageSource,
  PageBytes,
  PageSource,
  PageSourceSpec,
  SourceBlock,
} from "./source/page-source.ts";
export { SnapshotPageSource, type SnapshotSourceOptions } from "./source/snapshot-source.ts";
export { allocatedBytes } from "./source/allocation.ts";
export { printable, printableLines } from "./text.ts";
export { checkHost, type HostSupport } from "./uffd/support.ts";
export { attachQemu, type AttachOptions } from "./vmm/attach.ts";
export {
  type Background,
  type BackgroundRole,
  startBackground,
  takeBackgroundRole,
} from "./vmm/background.ts";
export { findQemus, type FoundQemu } from "./vmm/find-qemu.ts";
export { reattachQemu } from "./vmm/reattach.ts";
export { saveSnapshot, type SaveOptions, type SaveProgress } from "./vmm/save.ts";
export { findUnbegun } from "./vmm/unbegun.ts";
export { spawnQemu, type SpawnOptions } from "./vmm/spawn.ts";
export type {
  ExitStatus,
  FoundTarget,
  GuestRegion,
  ServedTarget,
  Target,
  TargetInfo,
  TargetRecord,
} from "./vmm/target.ts";

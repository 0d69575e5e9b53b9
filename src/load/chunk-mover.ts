import type { BlockState } from "./state.ts";
export interface ChunkMover {
  readonly isGone: boolean;
  canMove(state: BlockState, chunk: number): boolean;
  read(state: BlockState, chunk: number): boolean;
  move(state: BlockState, chunk: number): boolean;
}

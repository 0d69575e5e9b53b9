/** Medians, their spread, and ratios pair by pair. */

export interface Summary {
  readonly median: number;
  readonly min: number;
  readonly max: number;
  readonly count: number;
}

/** Of the values that are there; null when there is none. */
export function summarize(values: readonly (number | undefined)[]): Summary | null {
  const sorted = values
    .filter((value): value is number => value !== undefined && Number.isFinite(value))
    .toSorted((a, b) => a - b);
  const [min, max] = [sorted[0], sorted.at(-1)];
  if (min === undefined || max === undefined) return null;
  const middle = sorted.length / 2;
  const low = sorted[Math.ceil(middle) - 1] ?? min;
  const high = sorted[Math.floor(middle)] ?? max;
  return { median: (low + high) / 2, min, max, count: sorted.length };
}

/** Value by value, of the same round each. */
export function ratios(
  values: readonly (number | undefined)[],
  base: readonly (number | undefined)[],
): Summary | null {
  return summarize(
    values.map((value, round) => {
      const other = base[round];
      return value === undefined || other === undefined ? undefined : value / other;
    }),
  );
}

/** Embedded files: `with { type: "file" }` gives a path, `with { type: "text" }` the content. */
declare module "*.so" {
  const path: string;
  export default path;
}

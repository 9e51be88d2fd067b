/** Resources that are closed together, the latest first, whatever happened to them. */
export interface Closable {
  close(): Promise<void>;
}

export class Closing implements Closable {
  readonly #owned: Closable[] = [];

  own<Resource extends Closable>(resource: Resource): Resource {
    this.#owned.push(resource);
    return resource;
  }

  /** Closes all, and then throws the first error that closing gave. */
  async close(): Promise<void> {
    const errors: unknown[] = [];
    for (const resource of this.#owned.splice(0).reverse()) {
      await resource.close().catch((error: unknown) => errors.push(error));
    }
    if (errors.length > 0) throw errors[0];
  }
}

// Checks of one client against a running server: a line PASS or FAIL for each, and the exit code.

const [baseUrl, grpcAddress, model, embedder] = process.argv.slice(2);

class NoEmbedModel extends Error {}

export const server = {
  baseUrl,
  grpcAddress,
  model,
  /** The model that embeds; where the server has none, the check that asks for it is left out. */
  get embedModel() {
    if (embedder === "none") throw new NoEmbedModel("the server has no model that embeds");
    return embedder;
  },
};

const checks = [];

/** Registers a check; it fails by throwing. */
export function check(what, run) {
  checks.push({ what, run });
}

/** Fails where the condition is false; the message has what was found. */
export function expect(condition, ...found) {
  if (!condition) throw new Error(found.map((value) => JSON.stringify(value)?.slice(0, 400)).join(" ") || "not as expected");
}

/** The error that a promise ends in. */
export async function expectError(kind, run) {
  try {
    await run();
  } catch (error) {
    if (error instanceof kind) return error;
    throw error;
  }
  throw new Error(`${kind.name} expected`);
}

/** Runs every check, whichever fail before, and ends the program. */
export async function run(client) {
  let failed = 0;
  for (const { what, run } of checks) {
    try {
      await run();
      console.log(`PASS ${client}: ${what}`);
    } catch (error) {
      if (error instanceof NoEmbedModel) {
        console.log(`SKIP ${client}: ${what}: ${error.message}`);
        continue;
      }
      failed += 1;
      const line = /[a-z_]+\.mjs:(\d+):\d+\)?$/m.exec((error.stack ?? "").replace(/.*check\.mjs.*\n?/g, ""))?.[1] ?? "?";
      console.log(`FAIL ${client}: ${what} (line ${line}): ${String(error).replace(/\s+/g, " ").slice(0, 600)}`);
    }
  }
  process.exit(failed ? 1 : 0);
}

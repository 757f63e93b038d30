//! Fuzz targets: everything that reads bytes from a model's files or from a caller.
//!
//! Each target states what one input may take, and the arithmetic behind it. A failing input is saved; once
//! its fault is fixed, it joins the corpus.

#![expect(clippy::unwrap_used, reason = "a test ends by panicking")]

mod chat;
mod checkpoint;
mod encoded;
mod format;
mod gguf;
mod grpc;
mod http;
mod quantised;
mod scripted;
mod seeds;

use std::path::{Path, PathBuf};
use std::time::Duration;
use trustformers_fuzz::{Bounds, CountingHeap, Target};

#[global_allocator]
static HEAP: CountingHeap = CountingHeap;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// No input needs a tenth of a second on an idle machine. Tests share theirs, so the bound leaves room.
const TIME: Duration = Duration::from_secs(5);

/// The folder of a target's saved inputs.
fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name)
}

/// Fuzzes one target from its saved inputs.
fn fuzz(name: &str, words: &[&str], bounds: Bounds, function: impl FnMut(&[u8]) -> String) {
    fuzz_made(name, &[], words, bounds, function);
}

/// Fuzzes one target from its saved inputs and from those that it makes.
fn fuzz_made(
    name: &str,
    made: &[Vec<u8>],
    words: &[&str],
    bounds: Bounds,
    function: impl FnMut(&[u8]) -> String,
) {
    let work = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    let target = Target { name, corpus: &corpus(name), made, work: &work, words, bounds };
    trustformers_fuzz::run(&target, function);
}

/// The first line of an input, which says how the rest is read, and the rest.
fn split_line(input: &[u8]) -> (&str, &[u8]) {
    let end = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    let line = std::str::from_utf8(&input[..end]).unwrap_or("");
    (line, input.get(end + 1..).unwrap_or(&[]))
}

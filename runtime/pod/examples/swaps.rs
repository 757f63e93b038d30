//! Swaps under load on this processor: two revisions change places while streams run. Prints one line each,
//! `name value need ok|MISS`, and exits with 1 where one is missed. At the end candidates that must not serve
//! are loaded beside the streams. Each answer is compared with the tokens that its version gave alone.
//!
//! `cargo run --profile ci -p trustformers-runtime --example swaps -- --streams 32 --swaps 100`. Without
//! `--model` and `--candidate` both are seeded models of SmolLM2's shape, so that nothing is downloaded. With
//! `--reload` every swap also loads the next version and unloads the one before.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use futures::StreamExt;
use tokio::sync::{Mutex, watch};
use trustformers_api::{Event, Generation, Health, Inference, LeftOut, Options, Priority};
use trustformers_model::seeded::SeededModel;
use trustformers_plan::DType;
use trustformers_runtime::device;
use trustformers_runtime::load::Loader;
use trustformers_runtime::models::ModelServer;
use trustformers_runtime::probe::GoldenProbe;
use trustformers_runtime::slots::{SwapTarget, VersionFilter};
use trustformers_runtime::spec::ModelSpec;
use trustformers_store::Source;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Longest time of a swap, once the version is loaded.
const MAX_SWAP: Duration = Duration::from_secs(1);
/// Memory after the run, compared with that before it.
const MAX_MEMORY_DRIFT_PERCENT: f64 = 5.0;

#[derive(Debug, Parser)]
struct Flags {
    /// Streams at a time.
    #[arg(long, default_value_t = 32)]
    streams: usize,
    /// Swaps in all.
    #[arg(long, default_value_t = 100)]
    swaps: usize,
    /// Tokens of an answer.
    #[arg(long, default_value_t = 16)]
    tokens: u32,
    /// Loads the next version before every swap and unloads the one before.
    #[arg(long)]
    reload: bool,
    /// The file of the first version.
    #[arg(long, requires = "candidate")]
    model: Option<PathBuf>,
    /// The file of the second version.
    #[arg(long, requires = "model")]
    candidate: Option<PathBuf>,
}

/// The gap between two tokens of a stream.
#[derive(Clone, Copy)]
struct TokenGap {
    begin: Instant,
    length: Duration,
}

/// What the streams and the swaps share.
struct Shared {
    server: ModelServer,
    expected: HashMap<String, Vec<u32>>,
    tokens: u32,
    stop: AtomicBool,
    failed: AtomicUsize,
    mixed: AtomicUsize,
    answered: watch::Sender<HashMap<String, usize>>,
    gaps: Mutex<Vec<TokenGap>>,
}

fn main() -> Result<ExitCode, AnyError> {
    let flags = Flags::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let met = runtime.block_on(run(&flags))?;
    runtime.shutdown_background();
    Ok(if met { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn run(flags: &Flags) -> Result<bool, AnyError> {
    let folder = tempfile::tempdir()?;
    let paths = match (&flags.model, &flags.candidate) {
        (Some(model), Some(candidate)) => [model.clone(), candidate.clone()],
        _ => [seeded(folder.path(), 1)?, seeded(folder.path(), 2)?],
    };
    let loader = Arc::new(Loader::new(device::real(), &prometheus::Registry::new())?);
    let server = ModelServer::new(vec![version("r1", &paths[0])])?;
    server.start_loading(&loader);
    server.readiness().wait_for(|verdict| verdict.ok).await?;
    let mut expected = HashMap::new();
    let answer = ask(&server, None, flags.tokens, &mut Vec::new()).await?;
    expected.insert(answer.digest, answer.ids);
    server.load(version("r2", &paths[1])).await?;
    let answer = ask(&server, Some("r2"), flags.tokens, &mut Vec::new()).await?;
    expected.insert(answer.digest, answer.ids);
    let answers: HashSet<&Vec<u32>> = expected.values().collect();
    if answers.len() != 2 {
        return Err("the two files answer alike: no answer could be told from the other version's".into());
    }
    let shared = Arc::new(Shared {
        server,
        expected,
        tokens: flags.tokens,
        stop: AtomicBool::new(false),
        failed: AtomicUsize::new(0),
        mixed: AtomicUsize::new(0),
        answered: watch::Sender::new(HashMap::new()),
        gaps: Mutex::default(),
    });
    let streams: Vec<_> = (0..flags.streams).map(|_| tokio::spawn(stream(Arc::clone(&shared)))).collect();
    // One round, so that all buffers and caches have their size.
    swap(&shared, "r2").await?;
    swap(&shared, "r1").await?;
    let before = memory(&loader)?;
    let mut times = SwapTimes::default();
    for index in 0..flags.swaps {
        if flags.reload {
            times.loads.push(reload(&shared, index, &paths).await?);
        }
        let revision = revision(flags.reload, index);
        times.moments.push(Instant::now());
        let (took, first) = swap(&shared, &revision).await?;
        times.swaps.push(took);
        times.first_answers.push(first);
    }
    let after = memory(&loader)?;
    let candidates = bad_candidates(&shared, folder.path(), &paths[0]).await?;
    shared.stop.store(true, Ordering::SeqCst);
    for stream in streams {
        stream.await?;
    }
    report(&shared, times, &candidates, [before, after]).await
}

/// What became of a candidate that must not serve.
struct Candidate {
    name: &'static str,
    /// What the load answered.
    answer: String,
    /// Whether it was refused while the version that answers stayed.
    is_refused: bool,
}

/// Loads files that must not serve, one after the other, in the second slot.
async fn bad_candidates(shared: &Shared, folder: &Path, good: &Path) -> Result<Vec<Candidate>, AnyError> {
    let bytes = std::fs::read(good)?;
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).map(|()| path)
    };
    let mut not_finite = bytes.clone();
    let values = not_finite.len().saturating_sub(1024);
    // The last tensor's values are no numbers, whichever type they have.
    not_finite[values..].fill(0xff);
    let mut pinned = version("pinned", good);
    pinned.sha256 = Some("0".repeat(64));
    let mut large = version("large", good);
    large.engine.context_tokens = Some(1 << 30);
    let mut wrong = version("wrong", good);
    wrong.probes = vec![GoldenProbe::of_beginning("Hello", "no such answer")?];
    let truncated = version("truncated", &file("truncated.gguf", &bytes[..bytes.len() / 2])?);
    let not_finite = version("not-finite", &file("not-finite.gguf", &not_finite)?);
    let cases = [
        ("half of a file", truncated),
        ("another digest", pinned),
        ("weights that are no numbers", not_finite),
        ("a context beyond the model's", large),
        ("a wrong answer to the golden probe", wrong),
    ];
    let mut candidates = Vec::new();
    for (name, spec) in cases {
        let before = shared.server.statuses().watch().borrow()[0].digest.clone();
        let loaded = shared.server.load(spec).await;
        let stays = shared.server.statuses().watch().borrow()[0].digest == before;
        let is_refused = loaded.is_err() && stays;
        let answer = loaded.map_or_else(|error| error.to_string(), |_| "it was loaded".to_owned());
        candidates.push(Candidate { name, answer: answer.chars().take(60).collect(), is_refused });
    }
    Ok(candidates)
}

/// When the swaps were, and how long they took.
#[derive(Default)]
struct SwapTimes {
    moments: Vec<Instant>,
    swaps: Vec<Duration>,
    first_answers: Vec<Duration>,
    loads: Vec<Duration>,
}

/// The revision that this swap puts in force.
fn revision(reload: bool, index: usize) -> String {
    if reload { format!("swap-{index}") } else { format!("r{}", (index + 1) % 2 + 1) }
}

/// Unloads the version before and loads the next one. Gives the time of both.
async fn reload(shared: &Shared, index: usize, paths: &[PathBuf; 2]) -> Result<Duration, AnyError> {
    let begin = Instant::now();
    let digest = shared.server.statuses().watch().borrow()[0].slots[1].digest.clone();
    let meant = VersionFilter { digest: Some(digest), revision: None };
    shared.server.unload_version("m", &meant).await?;
    shared.server.load(version(&revision(true, index), &paths[(index + 1) % 2])).await?;
    Ok(begin.elapsed())
}

/// Swaps and waits for the first answer of the version. Gives the time of both.
async fn swap(shared: &Shared, revision: &str) -> Result<(Duration, Duration), AnyError> {
    let begin = Instant::now();
    let target = SwapTarget::Version(VersionFilter { digest: None, revision: Some(revision.to_owned()) });
    let digest = shared.server.swap("m", &target, None)?.digest;
    let took = begin.elapsed();
    let count = |counts: &HashMap<String, usize>| counts.get(&digest).copied().unwrap_or_default();
    let before = count(&shared.answered.borrow());
    let mut answered = shared.answered.subscribe();
    answered.wait_for(|counts| count(counts) > before).await?;
    Ok((took, begin.elapsed()))
}

/// One caller after another, until the run is over.
async fn stream(shared: Arc<Shared>) {
    while !shared.stop.load(Ordering::SeqCst) {
        let mut gaps = Vec::new();
        match ask(&shared.server, None, shared.tokens, &mut gaps).await {
            Ok(answer) if shared.expected.get(&answer.digest) == Some(&answer.ids) => {
                shared.answered.send_modify(|counts| *counts.entry(answer.digest).or_default() += 1);
            }
            Ok(_) => {
                shared.mixed.fetch_add(1, Ordering::SeqCst);
            }
            Err(error) => {
                eprintln!("{error}");
                shared.failed.fetch_add(1, Ordering::SeqCst);
            }
        }
        shared.gaps.lock().await.append(&mut gaps);
    }
}

/// A greedy answer and who gave it.
struct Answered {
    digest: String,
    ids: Vec<u32>,
}

async fn ask(
    server: &ModelServer,
    revision: Option<&str>,
    tokens: u32,
    gaps: &mut Vec<TokenGap>,
) -> Result<Answered, AnyError> {
    let request = Generation {
        prompt: "Hello, this is a prompt of some words".into(),
        model: None,
        revision: revision.map(str::to_owned),
        max_tokens: tokens,
        temperature: 0.0,
        top_p: 1.0,
        seed: None,
        priority: Priority::Normal,
        tenant: String::new(),
        options: Options::default(),
        left_out: LeftOut::default(),
    };
    let mut answer = server.generate(request).await?;
    let (mut ids, mut last) = (Vec::new(), None::<Instant>);
    while let Some(event) = answer.events.next().await {
        if let Event::Token { id, .. } = event? {
            let now = Instant::now();
            gaps.extend(last.map(|begin| TokenGap { begin, length: now - begin }));
            last = Some(now);
            ids.push(id);
        }
    }
    Ok(Answered { digest: answer.model_digest, ids })
}

/// The lengths of the gaps in which one of `moments` lies. A long gap is more likely to hold a moment than a
/// short one, so these compare with gaps at other moments, not with all gaps.
fn gaps_at(gaps: &[TokenGap], moments: &[Instant]) -> Vec<Duration> {
    let holds = |gap: &&TokenGap| {
        moments.iter().any(|moment| gap.begin <= *moment && *moment <= gap.begin + gap.length)
    };
    gaps.iter().filter(holds).map(|gap| gap.length).collect()
}

async fn report(
    shared: &Shared,
    mut times: SwapTimes,
    candidates: &[Candidate],
    memory: [Memory; 2],
) -> Result<bool, AnyError> {
    let gaps = shared.gaps.lock().await.clone();
    let mut during = gaps_at(&gaps, &times.moments);
    // Half-way between two swaps.
    let between: Vec<Instant> =
        times.moments.windows(2).map(|pair| pair[0] + (pair[1] - pair[0]) / 2).collect();
    let mut other = gaps_at(&gaps, &between);
    let mut all: Vec<Duration> = gaps.iter().map(|gap| gap.length).collect();
    let (swap_p50, swap_p99) = (percentile(&mut times.swaps, 50), percentile(&mut times.swaps, 99));
    let answers: usize = shared.answered.borrow().values().sum();
    let [before, after] = memory;
    let drift = (after.resident_bytes as f64 / before.resident_bytes as f64 - 1.0) * 100.0;
    // The pause of a swap is what a gap at a swap is longer than a gap between swaps; a gap is a step.
    let step = percentile(&mut all, 50);
    let pause = percentile(&mut during, 50).saturating_sub(percentile(&mut other, 50));
    let mut rows = vec![
        ("swaps", times.swaps.len().to_string(), "all".to_owned(), true),
        ("answers", answers.to_string(), "> 0".to_owned(), answers > 0),
        ("failed answers", count(&shared.failed), "0".to_owned(), count(&shared.failed) == "0"),
        ("answers of two versions", count(&shared.mixed), "0".to_owned(), count(&shared.mixed) == "0"),
        ("swap p50", format!("{swap_p50:?}"), format!("< {MAX_SWAP:?}"), swap_p50 < MAX_SWAP),
        ("swap p99", format!("{swap_p99:?}"), format!("< {MAX_SWAP:?}"), swap_p99 < MAX_SWAP),
        (
            "first whole answer of the version p50",
            format!("{:?}", percentile(&mut times.first_answers, 50)),
            "-".to_owned(),
            true,
        ),
        ("load and unload p50", format!("{:?}", percentile(&mut times.loads, 50)), "-".to_owned(), true),
        (
            "pause of streams at a swap p50",
            format!("{pause:?}"),
            format!("<= a step, {step:?}"),
            pause <= step,
        ),
        (
            "gap of streams at a swap p99",
            format!("{:?}", percentile(&mut during, 99)),
            format!("- (between swaps {:?})", percentile(&mut other, 99)),
            true,
        ),
        (
            "resident memory",
            format!("{:+.1} % of {} MiB", drift, before.resident_bytes >> 20),
            format!("± {MAX_MEMORY_DRIFT_PERCENT} %"),
            drift.abs() <= MAX_MEMORY_DRIFT_PERCENT,
        ),
        (
            "reserved memory",
            format!("{} MiB", after.reserved_bytes >> 20),
            format!("{} MiB", before.reserved_bytes >> 20),
            after.reserved_bytes == before.reserved_bytes,
        ),
    ];
    for candidate in candidates {
        rows.push((candidate.name, candidate.answer.clone(), "refused".to_owned(), candidate.is_refused));
    }
    for (name, value, need, met) in &rows {
        println!("{name:40} {value:24} {need:32} {}", if *met { "ok" } else { "MISS" });
    }
    Ok(rows.iter().all(|row| row.3))
}

fn count(counter: &AtomicUsize) -> String {
    counter.load(Ordering::SeqCst).to_string()
}

fn percentile(samples: &mut [Duration], percent: usize) -> Duration {
    samples.sort_unstable();
    samples
        .get((samples.len() * percent / 100).min(samples.len().saturating_sub(1)))
        .copied()
        .unwrap_or_default()
}

/// Memory of the process, and what its models have reserved.
#[derive(Clone, Copy)]
struct Memory {
    resident_bytes: u64,
    reserved_bytes: u64,
}

fn memory(loader: &Loader) -> Result<Memory, AnyError> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    // Without the pages of mapped files, which the system may keep or drop as it likes.
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).ok_or("no RssAnon")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(Memory { resident_bytes: kib << 10, reserved_bytes: loader.reserved_bytes() })
}

fn version(revision: &str, path: &Path) -> ModelSpec {
    let mut spec = ModelSpec::new("m", Source::from_path(path));
    spec.revision = revision.to_owned();
    // Greedy answers are compared, which must not depend on what runs beside them.
    spec.engine.numerics = trustformers_engine::Numerics::Exact;
    spec.engine.context_tokens = Some(256);
    spec
}

/// A model of the shape of SmolLM2-135M, without its vocabulary.
fn seeded(folder: &Path, seed: u64) -> Result<PathBuf, AnyError> {
    let model = SeededModel {
        seed,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        feed_forward: 1536,
        context_tokens: 256,
        dtype: DType::Q8_0,
        ..SeededModel::default()
    };
    let file = folder.join(format!("seed-{seed}.gguf"));
    std::fs::write(&file, model.gguf())?;
    Ok(file)
}

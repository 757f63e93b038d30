//! A model's files become a model: finding or fetching them, their digest, and reading them.
//!
//! Where a digest is pinned, the files are read once for the digest and then, from the page cache, by the
//! model's reader: nothing is ever parsed that was not what was pinned. Without a pin the digest only names
//! what was loaded, so a thread of its own computes it while the model is read.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use trustformers_model::{CheckpointFiles, Model, ReadProgress, Task};
use trustformers_store::{Digest, Fetched, Resolved, StoreError};

use crate::failure::Failure;
use crate::load::{go_on, not_wanted, wanted_files};
use crate::model_files::{self, Listener, ModelFiles};
use crate::spec::ModelSpec;

/// How often the progress of a digest is reported while nothing else is done.
const REPORT_INTERVAL: Duration = Duration::from_millis(50);

/// Hears of progress, in bytes done of two passes over all files and bytes of one pass; and whether to go on.
pub(crate) struct ReadListener<'a> {
    pub(crate) progress: &'a dyn Fn(u64, u64),
    pub(crate) is_wanted: &'a dyn Fn() -> bool,
}

/// A model that was read.
pub(crate) struct ReadFiles {
    /// Bytes of its files.
    pub(crate) total_bytes: u64,
    pub(crate) digest: Digest,
    /// Keeps files of the cache there.
    pub(crate) fetched: Option<Fetched>,
    pub(crate) model: Model,
    /// How long only the digest was computed.
    pub(crate) digest_time: Duration,
}

/// Reads the model of a spec. Blocking.
pub(crate) fn read(spec: &ModelSpec, listener: &ReadListener<'_>) -> Result<ReadFiles, Failure> {
    match (spec.source.path(), &spec.sha256) {
        (Some(root), None) => {
            let files = spec.source.resolve(&spec.files)?;
            beside_its_digest(&Wanted { root, files: &files, task: spec.asked_task() }, listener)
        }
        // What is fetched has its digest when it is there.
        _ => after_its_digest(spec, listener),
    }
}

fn after_its_digest(spec: &ModelSpec, listener: &ReadListener<'_>) -> Result<ReadFiles, Failure> {
    let ReadListener { progress, is_wanted } = *listener;
    let started = Instant::now();
    let hashing = Listener { progress: &|done, total| progress(done.min(total), total), is_wanted };
    let found = model_files::find(&wanted_files(spec, &spec.source), &hashing);
    if !is_wanted() {
        return Err(not_wanted());
    }
    let ModelFiles { resolved: files, digest, root, fetched } = found?;
    let (total_bytes, digest_time) = (files.total_bytes(), started.elapsed());
    let wanted = Wanted { root: &root, files: &files, task: spec.asked_task() };
    let model = parse(&wanted, &mut |read| {
        progress(total_bytes + scaled(read, total_bytes), total_bytes);
        go_on(is_wanted)
    })?;
    Ok(ReadFiles { total_bytes, digest, fetched, model, digest_time })
}

/// Reads files that lie on this machine while another thread computes their digest. Progress is reported by
/// this thread alone, so that it never falls.
fn beside_its_digest(wanted: &Wanted<'_>, listener: &ReadListener<'_>) -> Result<ReadFiles, Failure> {
    let ReadListener { progress, is_wanted } = *listener;
    let files = wanted.files;
    let total_bytes = files.total_bytes();
    let (hashed_bytes, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let report = |read_bytes: u64| {
        let hashed_bytes = hashed_bytes.load(Ordering::Relaxed).min(total_bytes);
        progress(hashed_bytes + read_bytes, total_bytes);
        if !is_wanted() {
            stop.store(true, Ordering::Relaxed);
        }
    };
    let digest_of = || {
        files.digest_while(&mut |hashed| {
            hashed_bytes.store(hashed.done_bytes, Ordering::Relaxed);
            go_on(&|| !stop.load(Ordering::Relaxed))
        })
    };
    // Nothing is sent: the end of the thread closes it.
    let (ended, end) = mpsc::sync_channel::<()>(1);
    let (digest, model, digest_time) = std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("digest".to_owned());
        let hasher = builder.spawn_scoped(scope, || {
            // Dropped when the thread ends, however it does.
            let _ended = ended;
            digest_of()
        });
        let mut read_bytes = 0;
        let model = parse(wanted, &mut |read| {
            read_bytes = scaled(read, total_bytes);
            report(read_bytes);
            go_on(is_wanted)
        });
        let waiting_since = Instant::now();
        let digest: Result<Digest, StoreError> = match hasher {
            Ok(hasher) => {
                while end.recv_timeout(REPORT_INTERVAL) == Err(mpsc::RecvTimeoutError::Timeout) {
                    report(read_bytes);
                }
                hasher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }
            // The system has no thread to spare.
            Err(_) => digest_of(),
        };
        report(read_bytes);
        (digest, model, waiting_since.elapsed())
    });
    Ok(ReadFiles { total_bytes, digest: digest?, fetched: None, model: model?, digest_time })
}

/// The bytes that a reader has read, of a file that may be one of several, as a part of all bytes.
fn scaled(read: ReadProgress, total_bytes: u64) -> u64 {
    let ReadProgress { bytes, total_bytes: of } = read;
    if of == 0 { 0 } else { mul_div(total_bytes, bytes.min(of), of) }
}

/// `a * b / c` without overflow on the way.
pub(crate) fn mul_div(a: u64, b: u64, c: u64) -> u64 {
    u64::try_from(u128::from(a) * u128::from(b) / u128::from(c.max(1))).unwrap_or(u64::MAX)
}

/// The files that become a model.
struct Wanted<'a> {
    root: &'a std::path::Path,
    files: &'a Resolved,
    /// The task that was asked for.
    task: Option<Task>,
}

fn parse(
    wanted: &Wanted<'_>,
    reading: &mut dyn FnMut(ReadProgress) -> std::ops::ControlFlow<()>,
) -> Result<Model, Failure> {
    let Wanted { root, files, task } = *wanted;
    Ok(match checkpoint(root, files) {
        Some(checkpoint) => Model::load_checkpoint_while(&checkpoint.asked_for(task), reading)?,
        None => Model::load_files_while(&model_files(files)?, reading)?,
    })
}

/// The checkpoint among the files picked, if they are one: `model.safetensors`, or the list of its parts, and
/// what lies beside and below it.
fn checkpoint(root: &std::path::Path, files: &Resolved) -> Option<CheckpointFiles> {
    let mut folders = files.files().iter().filter_map(|file| {
        let name = file.name.strip_suffix(".index.json").unwrap_or(&file.name);
        name.strip_suffix("model.safetensors")
    });
    let folder = folders.find(|folder| folder.is_empty() || folder.ends_with('/'))?;
    let below = files.files().iter().filter_map(|file| {
        let name = file.name.strip_prefix(folder)?;
        Some((name.to_owned(), file.path.clone()))
    });
    Some(CheckpointFiles::new(root.join(folder), below))
}

/// The file among those picked that is the model, or all its parts in their order. The others (a licence, a
/// card) only count in the digest.
pub(crate) fn model_files(files: &Resolved) -> Result<Vec<&std::path::Path>, Failure> {
    let is_model = |name: &str| name.to_ascii_lowercase().ends_with(".gguf");
    let models = || files.files().iter().filter(|file| is_model(&file.name));
    if trustformers_store::are_parts(models().map(|file| file.name.as_str())) {
        return Ok(models().map(|file| file.path.as_path()).collect());
    }
    let mut models = models();
    match (models.next(), models.next()) {
        (Some(file), None) => Ok(vec![file.path.as_path()]),
        (None, _) if files.files().len() == 1 => Ok(vec![files.files()[0].path.as_path()]),
        (None, _) => Err(Failure::permanent("ModelFileNotFound", "none of the picked files is a .gguf file")),
        (Some(one), Some(other)) => Err(Failure::permanent(
            "UnsupportedModel",
            format!(
                "{} and {} were both picked, and they are not all the parts of one model; pick one model with \
                 \"files\"",
                one.name, other.name
            ),
        )),
    }
}

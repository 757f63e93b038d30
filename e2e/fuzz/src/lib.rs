//! Runs a function on mutated inputs and checks the time and the memory that each input takes.
//!
//! A target's corpus is a folder of small text files: valid inputs, and hostile inputs that once failed.
//! Valid binary inputs are made by the target itself, since no binary is committed. [`run`] first replays
//! both, then mutates them until the time is over. An input whose outcome has new words joins the inputs that
//! are mutated; parsers that name each fault thus show how far an input came, without instrumentation of the
//! code. `proptest` chooses the mutations and reduces a failing list of them.
//!
//! | variable | meaning |
//! |---|---|
//! | `FUZZ_SECONDS` | processor time, in seconds, of the mutations of each target; default 1 |
//! | `FUZZ_SEED` | an integer that selects another sequence of mutations; default 0 |
//!
//! The input in progress lies in the folder that [`Target::work`] names. It survives an abort of the process,
//! such as one by a stack overflow.

mod cpu_time;
mod heap;
mod mutate;
mod watchdog;

pub use heap::CountingHeap;

use cpu_time::CpuTime;
use mutate::{Mutation, mutated};
use proptest::collection::vec;
use proptest::prelude::any;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use watchdog::Watchdog;

/// Inputs between two looks at the clock.
const BATCH: u32 = 128;

/// Inputs with new outcomes that are kept for further mutation. At [`Bounds::input_bytes`] of 64 KiB they
/// take 64 MiB.
const MAX_KEPT: usize = 1024;

/// How long a failing list of mutations is reduced, in milliseconds.
const MAX_REDUCING_MS: u32 = 30_000;

/// Mutations of one input.
const MAX_MUTATIONS: usize = 6;

/// Characters of an outcome that are compared.
const OUTCOME_CHARS: usize = 100;

/// One target runs at a time, since the heap is counted for the whole process.
static TURN: Mutex<()> = Mutex::new(());

/// What one input may take.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Longest input; longer mutations are cut.
    pub input_bytes: usize,
    /// Heap beyond what was allocated before, at most.
    pub heap_bytes: usize,
    /// Processor time of all threads.
    pub time: Duration,
}

/// A function under test.
#[derive(Debug)]
pub struct Target<'a> {
    /// Its name, and that of its folder in the corpus.
    pub name: &'a str,
    /// The folder with the target's saved inputs; it may be absent where `made` has some.
    pub corpus: &'a Path,
    /// Inputs that the target makes itself.
    pub made: &'a [Vec<u8>],
    /// The folder for the input in progress and for failing inputs.
    pub work: &'a Path,
    /// Words of the input's language, which mutations insert.
    pub words: &'a [&'a str],
    /// What each input may take.
    pub bounds: Bounds,
}

/// Replays the corpus and mutates it for `FUZZ_SECONDS`. `function` returns its outcome in words.
///
/// # Panics
/// When an input panics or exceeds a bound. The message names the file that holds it.
pub fn run(target: &Target<'_>, mut function: impl FnMut(&[u8]) -> String) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let made = target.made.iter().map(|input| (PathBuf::from("an input made by the target"), input.clone()));
    let mut saved: Vec<_> = made.collect();
    if target.corpus.exists() {
        saved.extend(corpus(target.corpus));
    }
    assert!(!saved.is_empty(), "{} holds no inputs", target.corpus.display());
    fs::create_dir_all(target.work).unwrap_or_else(|error| panic!("{}: {error}", target.work.display()));
    let current = Current::open(target.work.join(format!("{}.current", target.name)));
    let (kept, outcomes) = (Vec::new(), BTreeSet::new());
    let mut session = Session { target, function: &mut function, current, kept, outcomes };
    for (path, input) in saved {
        if let Err(error) = session.checked(&input) {
            panic!("{}: {}: {error}", target.name, path.display());
        }
        session.kept.push(input);
    }
    session.mutate(seconds());
}

fn seconds() -> Duration {
    let seconds = std::env::var("FUZZ_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(1))
}

/// A runner of one batch, since a runner ends for good when it has run its number of inputs.
fn runner(batch: u64) -> TestRunner {
    let seed: u64 = std::env::var("FUZZ_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&batch.to_le_bytes());
    let config = Config {
        cases: BATCH,
        failure_persistence: None,
        max_shrink_iters: 500,
        max_shrink_time: MAX_REDUCING_MS,
        ..Config::default()
    };
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

/// Every saved input with its path, sorted by name.
fn corpus(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    let read = |path: PathBuf| {
        let input = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        (path, input)
    };
    paths.into_iter().map(read).collect()
}

/// The file of the input in progress. It stays open: to truncate it to nothing each time would make the file
/// system write it to the disk each time.
struct Current {
    path: PathBuf,
    file: File,
}

impl Current {
    fn open(path: PathBuf) -> Self {
        let file = File::create(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path, file }
    }

    fn replace(&mut self, input: &[u8]) -> std::io::Result<()> {
        self.file.rewind()?;
        self.file.write_all(input)?;
        self.file.set_len(input.len() as u64)
    }
}

/// The run of one target.
struct Session<'a, F> {
    target: &'a Target<'a>,
    function: &'a mut F,
    current: Current,
    /// Inputs that are mutated.
    kept: Vec<Vec<u8>>,
    outcomes: BTreeSet<String>,
}

impl<F: FnMut(&[u8]) -> String> Session<'_, F> {
    fn mutate(&mut self, time: Duration) {
        let began = CpuTime::start();
        let mut batches = 0_u64;
        let target = self.target;
        let strategy = (any::<Index>(), vec(Mutation::any(), 1..=MAX_MUTATIONS));
        while began.elapsed() < time {
            // A batch mutates the inputs that were kept before it.
            let kept = std::mem::take(&mut self.kept);
            let make = |(index, mutations): &(Index, Vec<Mutation>)| {
                let mut input = mutated(&kept[index.index(kept.len())], mutations, &kept, target.words);
                input.truncate(target.bounds.input_bytes);
                input
            };
            let new = RefCell::new(Vec::new());
            let session = RefCell::new(&mut *self);
            let ended = runner(batches).run(&strategy, |made| {
                let input = make(&made);
                let is_new = session.borrow_mut().checked(&input).map_err(TestCaseError::fail)?;
                if is_new && kept.len() + new.borrow().len() < MAX_KEPT {
                    new.borrow_mut().push(input);
                }
                Ok(())
            });
            if let Err(TestError::Fail(why, made)) = &ended {
                self.fail(&make(made), &why.to_string());
            }
            batches += 1;
            self.kept = kept;
            self.kept.append(&mut new.into_inner());
        }
        let inputs = batches * u64::from(BATCH);
        println!("{}: {inputs} inputs, {} outcomes", self.target.name, self.outcomes.len());
    }

    /// Runs the function once; true where the outcome is a new one.
    fn checked(&mut self, input: &[u8]) -> Result<bool, String> {
        let Bounds { heap_bytes, time, .. } = self.target.bounds;
        self.current.replace(input).map_err(|error| format!("{}: {error}", self.current.path.display()))?;
        let watchdog = Watchdog::start(self.target.name, &self.current.path, time);
        let began = CpuTime::start();
        let heap = heap::Peak::start();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (self.function)(input)));
        let used = heap.bytes();
        let took = began.elapsed();
        drop(watchdog);
        let outcome = outcome.map_err(|_| "it panicked; see above".to_owned())?;
        // A panic of a library may be contained and become a refusal. It is still a fault.
        if outcome.contains("panic") {
            return Err(outcome);
        }
        if used > heap_bytes {
            return Err(format!("it took {used} bytes of heap, more than {heap_bytes}"));
        }
        if took > time {
            return Err(format!("it took {took:?} of processor time, more than {time:?}"));
        }
        // Numbers differ from input to input without another path through the code.
        let words = outcome.chars().filter(|c| !c.is_ascii_digit()).take(OUTCOME_CHARS).collect();
        Ok(self.outcomes.insert(words))
    }

    fn fail(&self, input: &[u8], why: &str) -> ! {
        let path = self.target.work.join(format!("{}.failed", self.target.name));
        let saved = fs::write(&path, input);
        panic!(
            "{}: an input of {} bytes fails: {why}\nit is {} ({saved:?}); fix the fault, then copy the file to {}",
            self.target.name,
            input.len(),
            path.display(),
            self.target.corpus.display()
        );
    }
}

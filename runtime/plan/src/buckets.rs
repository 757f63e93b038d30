//! Executables by the number of rows, for devices whose steps have fixed shapes.
//!
//! A device that records a step once and replays it (a CUDA graph, a command buffer) computes as many rows as
//! it recorded. It claims a few numbers of rows, its *buckets* ([`crate::Caps::row_buckets`]), and has one
//! executable for each. [`compile`] makes them, and gives each step to the smallest one that holds its rows.
//!
//! **The padding rule.** The executable of a plan for `n` rows ([`Plan::for_rows`]) takes steps of at most
//! `n` rows. How it fills the rest is the device's own affair: rows beyond those of the step belong to no
//! sequence, are not stored in the cache, are in no answer, and change no bit of the step's own rows. So
//! nothing above this boundary knows of padding. The buffers of all plans for fewer rows lie where those of
//! the whole plan lie. The executables of one model share cache, arena and the latest sample: a token may be
//! the choice of a step that another executable computed, and steps in flight are counted together.

use std::collections::VecDeque;

use crate::{BackendError, Executable, Loaded, Plan, SampleInput, StepInput, StepOutput};

/// Makes a plan executable on a device with these buckets. Without any this is [`Loaded::compile`].
///
/// # Errors
/// As [`Loaded::compile`].
pub fn compile(
    loaded: &mut dyn Loaded,
    plan: &Plan,
    buckets: &[usize],
) -> Result<Box<dyn Executable>, BackendError> {
    let most = plan.limits().rows;
    let mut sizes: Vec<usize> = buckets.iter().copied().filter(|rows| (1..most).contains(rows)).collect();
    if sizes.is_empty() {
        return loaded.compile(plan);
    }
    sizes.push(most);
    sizes.sort_unstable();
    sizes.dedup();
    let executables = sizes.iter().map(|rows| loaded.compile(&plan.for_rows(*rows)));
    let executables = executables.collect::<Result<_, BackendError>>()?;
    Ok(Box::new(Bucketed { sizes, executables, in_flight: VecDeque::new() }))
}

/// The executables of a plan, one for each bucket.
struct Bucketed {
    /// The rows of each, ascending.
    sizes: Vec<usize>,
    executables: Vec<Box<dyn Executable>>,
    /// Which of them have the steps in flight, oldest first.
    in_flight: VecDeque<usize>,
}

impl Executable for Bucketed {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        let fits = self.sizes.partition_point(|rows| *rows < input.rows());
        // The largest one refuses what fits none.
        let index = fits.min(self.sizes.len() - 1);
        self.executables[index].submit(input)?;
        self.in_flight.push_back(index);
        Ok(())
    }

    fn sample(&mut self, input: &SampleInput) -> Result<(), BackendError> {
        let last = self.in_flight.back().ok_or(BackendError::Order("sample without submit"))?;
        self.executables[*last].sample(input)
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        let first = self.in_flight.pop_front().ok_or(BackendError::Order("wait without submit"))?;
        self.executables[first].wait(output)
    }
}

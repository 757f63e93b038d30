//! Whether a model fits in memory, decided before it is loaded.
//!
//! A process that exceeds its memory limit is killed without a message, and again after every restart. So the
//! memory that a model will take is computed from its plan, its weights and its settings, and compared with
//! the limit first. A model that does not fit is refused with the arithmetic. For a model that fits, the log
//! has the arithmetic.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use trustformers_engine::encoder::Encoder;
use trustformers_engine::{Engine, MemoryReport, max_grammar_bytes};
use trustformers_model::Model;
use trustformers_plan::{Backend, BackendError, Caps, EstimateSpec, LoadSpec, Loaded};
use trustformers_proto::Task;

use crate::failure::Failure;
use crate::spec::ModelSpec;

/// The process without models: runtime, connections, metrics and the allocator's reserves. 13 MiB were
/// measured before the first request.
const PROCESS_BYTES: u64 = 48 << 20;

/// Bytes of a tokenizer for each token: its text, an entry in a map, and a merge. 190 were measured with
/// Qwen2.5's 151,936 tokens.
const TOKENIZER_TOKEN_BYTES: u64 = 256;

/// Least memory for grammars. Where less memory than the configured budget is left, the budget becomes what
/// is left, but not less than this.
const MIN_GRAMMAR_MEMORY_BYTES: u64 = 16 << 20;

/// The memory that a model will take, by purpose.
#[derive(Debug, Clone, PartialEq, Eq)]
struct MemoryDemand {
    items: Vec<(&'static str, u64)>,
}

impl MemoryDemand {
    /// Computes the memory of a model. Where `free_bytes` is too little for the configured grammar memory,
    /// that is lowered.
    fn of(
        spec: &mut ModelSpec,
        model: &Model,
        backend: &dyn Backend,
        free_bytes: u64,
    ) -> Result<Self, Failure> {
        let facts = model.facts();
        let device = |report: &MemoryReport| {
            vec![
                ("weights", report.weights_bytes),
                ("KV cache", report.kv_bytes),
                ("activations", report.arena_bytes),
                ("scratch", report.other_bytes),
            ]
        };
        let tokenizer = ("tokenizer", facts.vocabulary as u64 * TOKENIZER_TOKEN_BYTES);
        if model.task() != Task::Generate {
            let config = spec.encoder_config();
            let mut items = device(&Encoder::estimate(model, backend, &config)?);
            items.extend([tokenizer, ("answers", config.answer_bytes(facts))]);
            return Ok(Self { items });
        }
        let config = spec.engine_config();
        let estimate = Engine::estimate(model, backend, &config)?;
        let mut items = device(&estimate.model);
        items.extend([
            ("draft model", estimate.draft.total_bytes()),
            tokenizer,
            ("answers", config.answer_bytes(facts)),
        ]);
        let mut demand = Self { items };
        let vocabulary = facts.vocabulary as u64;
        let left =
            free_bytes.saturating_sub(demand.total_bytes().saturating_add(max_grammar_bytes(0, vocabulary)));
        let configured = spec.engine.grammar_memory_bytes;
        spec.engine.grammar_memory_bytes = configured.min(left.max(MIN_GRAMMAR_MEMORY_BYTES));
        demand.items.push(("grammars", max_grammar_bytes(spec.engine.grammar_memory_bytes, vocabulary)));
        Ok(demand)
    }

    fn total_bytes(&self) -> u64 {
        self.items.iter().fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }

    /// `weights 1.2 GiB + KV cache 0.8 GiB + ... = 2.0 GiB`, without purposes that take nothing.
    fn arithmetic(&self) -> String {
        let items = self.items.iter().filter(|(_, bytes)| *bytes > 0);
        let items: Vec<String> =
            items.map(|(purpose, bytes)| format!("{purpose} {}", size(*bytes))).collect();
        format!("{} = {}", items.join(" + "), size(self.total_bytes()))
    }
}

/// The memory that the models of this process have reserved.
#[derive(Debug, Default)]
pub(crate) struct MemoryBudget {
    reserved_bytes: Arc<AtomicU64>,
}

impl MemoryBudget {
    /// Bytes that are reserved now.
    pub(crate) fn reserved_bytes(&self) -> u64 {
        self.reserved_bytes.load(Ordering::Relaxed)
    }

    /// Compares the memory that a model will take with the device's limit, and reserves it for as long as the
    /// returned backend exists. Loads must not run at the same time.
    ///
    /// # Errors
    /// `InsufficientMemory` with the arithmetic, or a setting that the engine refuses.
    pub(crate) fn admit(
        &self,
        spec: &mut ModelSpec,
        model: &Model,
        backend: Box<dyn Backend>,
    ) -> Result<Box<dyn Backend>, Failure> {
        let limit_bytes = backend.caps().memory_bytes;
        let others_bytes = self.reserved_bytes();
        let free_bytes = limit_bytes.saturating_sub(PROCESS_BYTES).saturating_sub(others_bytes);
        let demand = MemoryDemand::of(spec, model, &*backend, free_bytes)?;
        let (name, arithmetic) = (spec.name(), demand.arithmetic());
        let others = if others_bytes > 0 {
            format!(" and {} for the other models", size(others_bytes))
        } else {
            String::new()
        };
        let limit =
            format!("limit {} less {} for the process{others}", size(limit_bytes), size(PROCESS_BYTES));
        if demand.total_bytes() > free_bytes {
            return Err(Failure::permanent(
                "InsufficientMemory",
                format!(
                    "{name} does not fit in the memory of {}: {arithmetic}, {limit} = {}; lower contextTokens or \
                     maxBatchSize, take a smaller quantisation, or raise resources.limits.memory",
                    backend.caps().description,
                    size(free_bytes)
                ),
            ));
        }
        tracing::info!(model = name, "memory that the model will take: {arithmetic}, {limit}");
        let reservation = Reservation::new(&self.reserved_bytes, demand.total_bytes());
        Ok(Box::new(ReservedBackend { inner: backend, _reservation: reservation }))
    }
}

/// Bytes that are reserved until this is dropped.
struct Reservation {
    reserved_bytes: Arc<AtomicU64>,
    bytes: u64,
}

impl Reservation {
    fn new(reserved_bytes: &Arc<AtomicU64>, bytes: u64) -> Self {
        reserved_bytes.fetch_add(bytes, Ordering::Relaxed);
        Self { reserved_bytes: Arc::clone(reserved_bytes), bytes }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.reserved_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A backend that holds its model's reservation. The engine's thread owns it, so the memory is free when the
/// engine ends.
struct ReservedBackend {
    inner: Box<dyn Backend>,
    _reservation: Reservation,
}

impl Backend for ReservedBackend {
    fn caps(&self) -> &Caps {
        self.inner.caps()
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        self.inner.estimate(spec)
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        self.inner.load(spec)
    }
}

/// Bytes as text for people: GiB or MiB with one decimal.
fn size(bytes: u64) -> String {
    const MIB: f64 = 1_048_576.0;
    let mib = bytes as f64 / MIB;
    if mib < 1024.0 { format!("{mib:.1} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Loader, OnProgress};
    use crate::runner::Runner;
    use tempfile::TempDir;
    use trustformers_engine::Speculation;
    use trustformers_model::seeded::SeededModel;
    use trustformers_plan::oracle::Oracle;
    use trustformers_store::Source;

    /// The oracle on a device with little memory.
    struct LimitedOracle {
        oracle: Oracle,
        caps: Caps,
    }

    impl LimitedOracle {
        fn new(memory_bytes: u64) -> Self {
            let oracle = Oracle::new();
            let caps = Caps { memory_bytes, ..oracle.caps().clone() };
            Self { oracle, caps }
        }
    }

    impl Backend for LimitedOracle {
        fn caps(&self) -> &Caps {
            &self.caps
        }

        fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
            self.oracle.estimate(spec)
        }

        fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
            self.oracle.load(spec)
        }
    }

    /// A seeded model in a folder.
    fn seeded() -> (TempDir, ModelSpec) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("m.gguf"), SeededModel::default().gguf()).unwrap();
        let spec = ModelSpec::new("m", Source::from_path(folder.path()));
        (folder, spec)
    }

    fn model(folder: &TempDir) -> Model {
        Model::load(&folder.path().join("m.gguf"), &mut |_| {}).unwrap()
    }

    /// What the model takes when this much memory is free.
    fn demand(folder: &TempDir, spec: &ModelSpec, free_bytes: u64) -> MemoryDemand {
        MemoryDemand::of(&mut spec.clone(), &model(folder), &Oracle::new(), free_bytes).unwrap()
    }

    fn loader(limit_bytes: u64) -> Loader {
        let open = move |_: &ModelSpec| Ok(Box::new(LimitedOracle::new(limit_bytes)) as Box<dyn Backend>);
        Loader::new(Box::new(open), &prometheus::Registry::new()).unwrap()
    }

    fn load(loader: &Loader, spec: &ModelSpec) -> Result<Runner, Failure> {
        let quiet: OnProgress = Arc::new(|_, _| {});
        loader.load(spec, &quiet).map(|loaded| loaded.runner)
    }

    #[test]
    fn a_model_beyond_the_limit_is_refused_with_the_arithmetic() {
        let (folder, spec) = seeded();
        let needed_bytes = demand(&folder, &spec, 0).total_bytes();
        // The file alone would fit many times.
        assert!(model(&folder).facts().file_bytes < needed_bytes / 10);
        let failure = load(&loader(PROCESS_BYTES + needed_bytes - 1), &spec).unwrap_err();
        assert_eq!((failure.reason, failure.transient), ("InsufficientMemory", false));
        for text in
            ["KV cache ", " + activations ", " + answers ", " + grammars ", " = ", "limit ", "contextTokens"]
        {
            assert!(failure.message.contains(text), "{text} in {failure}");
        }
        load(&loader(PROCESS_BYTES + needed_bytes), &spec).unwrap();
    }

    #[tokio::test]
    async fn the_models_of_a_process_share_its_limit() {
        let (folder, spec) = seeded();
        let (most, least) = (demand(&folder, &spec, u64::MAX), demand(&folder, &spec, 0));
        let loader = Arc::new(loader(PROCESS_BYTES + most.total_bytes() + least.total_bytes() - 1));
        let load_one = || {
            let (loader, spec) = (Arc::clone(&loader), spec.clone());
            tokio::task::spawn_blocking(move || load(&loader, &spec))
        };
        let first = load_one().await.unwrap().unwrap();
        let failure = load_one().await.unwrap().unwrap_err();
        assert!(failure.message.contains("for the other models"), "{failure}");
        first.stop().await;
        load_one().await.unwrap().unwrap();
    }

    #[test]
    fn a_draft_model_is_counted() {
        let (folder, mut spec) = seeded();
        let alone = demand(&folder, &spec, 0);
        spec.engine.speculation = Some(Speculation::Draft(Arc::new(model(&folder))));
        let drafted = demand(&folder, &spec, 0);
        assert!(drafted.total_bytes() > alone.total_bytes());
        assert!(drafted.arithmetic().contains(" + draft model "), "{}", drafted.arithmetic());
    }

    #[test]
    fn grammar_memory_is_lowered_to_what_is_left() {
        let (folder, spec) = seeded();
        let grammar_bytes = |free_bytes| {
            let mut spec = spec.clone();
            MemoryDemand::of(&mut spec, &model(&folder), &Oracle::new(), free_bytes).unwrap();
            spec.engine.grammar_memory_bytes
        };
        let least = demand(&folder, &spec, 0).total_bytes();
        assert_eq!(grammar_bytes(u64::MAX), spec.engine.grammar_memory_bytes);
        assert_eq!(grammar_bytes(least + (5 << 20)), MIN_GRAMMAR_MEMORY_BYTES + (5 << 20));
        assert_eq!(grammar_bytes(0), MIN_GRAMMAR_MEMORY_BYTES);
    }

    #[test]
    fn sizes_are_printed_in_mib_and_gib() {
        assert_eq!((size(1 << 19).as_str(), size(3 << 29).as_str()), ("0.5 MiB", "1.5 GiB"));
    }
}

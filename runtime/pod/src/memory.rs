//! Whether a model fits in memory, decided before it is loaded.
//!
//! A process that exceeds its memory limit is killed without a message, and again after every restart. So the
//! memory that a model will take is computed from its plan, its weights and its settings, and compared with
//! the limit first. A model that does not fit is refused with the arithmetic. For a model that fits, the log
//! has the arithmetic.

use std::sync::Arc;

use trustformers_engine::encoder::Encoder;
use trustformers_engine::{Engine, MemoryReport, max_grammar_bytes};
use trustformers_model::Model;
use trustformers_plan::Backend;
use trustformers_proto::Task;

use crate::failure::Failure;
use crate::memory_ledger::{MemoryLedger, ReservedBackend};
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
        adapter_bytes: u64,
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
            ("adapters", adapter_bytes),
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

/// The memory that the models of this process share.
#[derive(Debug, Default)]
pub(crate) struct MemoryBudget {
    ledger: Arc<MemoryLedger>,
}

impl MemoryBudget {
    /// Bytes that are reserved now.
    pub(crate) fn reserved_bytes(&self) -> u64 {
        self.ledger.bytes()
    }

    /// Who has how much of a device: the process and the models, such as `48.0 MiB for the process, a 1.2
    /// GiB`.
    fn holders(&self) -> String {
        let models = self.ledger.holders();
        let models = models.iter().map(|own| format!(", {} {}", own.model, size(own.bytes())));
        format!("{} for the process{}", size(PROCESS_BYTES), models.collect::<String>())
    }

    /// Compares the memory that a model will take with what is left of the device's limit, and reserves it
    /// for as long as the returned backend exists. Waits a few seconds for what idle models can give back.
    /// `adapter_bytes` are those of its adapters. Loads must not run at the same time.
    ///
    /// # Errors
    /// `InsufficientMemory` with the arithmetic, or a setting that the engine refuses.
    pub(crate) fn admit(
        &self,
        spec: &mut ModelSpec,
        model: &Model,
        backend: Box<dyn Backend>,
        adapter_bytes: u64,
    ) -> Result<Box<dyn Backend>, Failure> {
        let limit_bytes = backend.caps().memory_bytes;
        let models_bytes = limit_bytes.saturating_sub(PROCESS_BYTES);
        // With no memory for it the budget of grammars is the least.
        let least = MemoryDemand::of(&mut spec.clone(), model, &*backend, adapter_bytes, 0)?;
        self.ledger.wait_for(least.total_bytes(), models_bytes);
        let free_bytes = models_bytes.saturating_sub(self.reserved_bytes());
        let demand = MemoryDemand::of(spec, model, &*backend, adapter_bytes, free_bytes)?;
        let (name, arithmetic) = (spec.name(), demand.arithmetic());
        let left = format!("{} left of the limit of {}", size(free_bytes), size(limit_bytes));
        if demand.total_bytes() > free_bytes {
            let advice = if self.reserved_bytes() > 0 { "unload another model, " } else { "" };
            return Err(Failure::permanent(
                "InsufficientMemory",
                format!(
                    "{name} does not fit in the memory of {}; {advice}lower contextTokens or maxBatchSize, take a \
                     smaller quantisation, or raise resources.limits.memory\nneeded: {arithmetic}\nthere: {left} \
                     ({})",
                    backend.caps().description,
                    self.holders()
                ),
            ));
        }
        tracing::info!(
            model = name,
            holders = self.holders(),
            "memory that the model will take: {arithmetic}, {left}"
        );
        let reservation = self.ledger.reserve(name, demand.total_bytes(), models_bytes);
        Ok(Box::new(ReservedBackend::new(backend, reservation)))
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
    use trustformers_plan::{BackendError, Caps, EstimateSpec, LoadSpec, Loaded};
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
        MemoryDemand::of(&mut spec.clone(), &model(folder), &Oracle::new(), 0, free_bytes).unwrap()
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
        // Two lines of figures: what it needs, and what is left and who has the rest.
        assert_eq!(failure.message.lines().count(), 3, "{failure}");
        for text in [
            "contextTokens",
            "\nneeded: ",
            "KV cache ",
            " + activations ",
            " + answers ",
            " + grammars ",
            " = ",
            "\nthere: ",
            " left of the limit of ",
            "48.0 MiB for the process)",
        ] {
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
        let holder = format!("48.0 MiB for the process, m {})", size(most.total_bytes()));
        assert!(failure.message.ends_with(&holder), "{failure}");
        assert!(failure.message.contains("unload another model"), "{failure}");
        assert_eq!(loader.reserved_bytes(), most.total_bytes());
        first.stop().await;
        assert_eq!(loader.reserved_bytes(), 0, "every byte is back");
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
            MemoryDemand::of(&mut spec, &model(&folder), &Oracle::new(), 0, free_bytes).unwrap();
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

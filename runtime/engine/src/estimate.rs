//! The device memory of an engine, computed from its settings before anything is loaded.

use crate::config::{EngineConfig, EngineSizes, KvBlocks, Speculation, StartError, kv_block_bytes};
use crate::encoder::{Encoder, EncoderConfig};
use crate::generation::Engine;
use crate::prefix_cache::BlockNeeds;
use crate::speculation::{self, MAX_VERIFY_ROWS};
use trustformers_model::{Model, PlanRequest};
use trustformers_plan::{
    AdapterRoom, Backend, BackendError, Caps, EstimateSpec, FusedOps, KvType, LayerClasses, Limits,
    MemoryReport, Numerics, Plan, PlanError,
};

/// The device memory that a generation engine will take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceEstimate {
    /// Of the model.
    pub model: MemoryReport,
    /// Of the draft model; zeros without one.
    pub draft: MemoryReport,
}

impl Engine {
    /// The device memory that [`Engine::start`] will take with the same arguments. Nothing is loaded.
    ///
    /// # Errors
    /// The errors of [`Engine::start`] that do not need a load.
    pub fn estimate(
        model: &Model,
        backend: &dyn Backend,
        config: &EngineConfig,
    ) -> Result<DeviceEstimate, StartError> {
        let sizes = sizes(model, backend.caps(), config)?;
        let of = |model: &Model, draft_rows, adapters| {
            let request = sizes.plan_request(draft_rows, backend.caps().fused);
            let EngineSizes { first_kv_blocks: kv_blocks, kv_type, .. } = sizes;
            let estimate = Estimate { kv_blocks, kv_type, numerics: config.numerics, adapters };
            estimate.of(model, &request, backend, |plan| sizes.with_classes(plan))
        };
        let draft_rows = draft_rows(config.speculation.as_ref());
        let draft = match &config.speculation {
            Some(Speculation::Draft(draft)) => of(draft, 0, AdapterRoom::NONE)?,
            Some(Speculation::Ngram) | None => MemoryReport::default(),
        };
        Ok(DeviceEstimate { model: of(model, draft_rows, sizes.adapters)?, draft })
    }
}

impl Encoder {
    /// The device memory that [`Encoder::start`] will take with the same arguments. Nothing is loaded.
    ///
    /// # Errors
    /// The errors of [`Encoder::start`] that do not need a load.
    pub fn estimate(
        model: &Model,
        backend: &dyn Backend,
        config: &EncoderConfig,
    ) -> Result<MemoryReport, StartError> {
        let sizes = config.sizes(model.facts().context_tokens, model.special_tokens())?;
        let request = sizes.plan_request(model.facts(), backend.caps().fused);
        let (numerics, adapters) = (config.numerics, AdapterRoom::NONE);
        let estimate = Estimate { kv_blocks: 0, kv_type: KvType::F32, numerics, adapters };
        estimate.of(model, &request, backend, |plan| plan)
    }
}

/// The settings of a load that the plan does not have.
struct Estimate {
    kv_blocks: usize,
    kv_type: KvType,
    numerics: Numerics,
    adapters: AdapterRoom,
}

impl Estimate {
    fn of(
        &self,
        model: &Model,
        request: &PlanRequest,
        backend: &dyn Backend,
        with_classes: impl Fn(Plan) -> Plan,
    ) -> Result<MemoryReport, StartError> {
        let Self { kv_blocks, kv_type, numerics, adapters } = *self;
        let estimate = || -> Result<MemoryReport, BackendError> {
            let plan = with_classes(model.plan_with_adapters(request, adapters)?);
            let weights = model.weights();
            backend.estimate(&EstimateSpec { weights, plan: &plan, kv_blocks, kv_type, numerics })
        };
        let device = || backend.caps().description.clone();
        estimate().map_err(|error| StartError::Backend { device: device(), message: error.to_string() })
    }
}

/// The sizes of an engine for a model on a device, after all checks of the configuration.
pub(crate) fn sizes(model: &Model, caps: &Caps, config: &EngineConfig) -> Result<EngineSizes, StartError> {
    let kv_type = config.kv_type(caps)?;
    config.check_adapters(caps)?;
    let (block_bytes, classes) = match &config.speculation {
        // A sequence has one block table for both models, so that all layers of both are in one group.
        Some(Speculation::Draft(draft)) => {
            speculation::check(model, draft)?;
            let block_bytes_of = |model: &Model| kv_block_bytes(model.facts(), kv_type);
            (block_bytes_of(model) + block_bytes_of(draft), LayerClasses::ONE)
        }
        Some(Speculation::Ngram) | None => {
            let plan = smallest_plan(model, config).map_err(|error| StartError::Backend {
                device: caps.description.clone(),
                message: error.to_string(),
            })?;
            (plan.kv_block_bytes(kv_type), plan.kv_layout().classes())
        }
    };
    // A sequence has no more rows in a step than the step may have.
    let needs = BlockNeeds { classes, rows: config.token_budget.saturating_mul(caps.steps_in_flight) };
    let mut sizes = config.sizes(model.facts().context_tokens, KvBlocks { block_bytes, kv_type, needs })?;
    if !caps.kv_resizes {
        sizes.first_kv_blocks = sizes.kv_blocks;
    }
    if let Some(Speculation::Draft(draft)) = &config.speculation {
        speculation::check_context(draft, sizes.context_tokens)?;
    }
    Ok(sizes)
}

/// A plan with the classes of layers that the model has in the configured context. A context that is out of
/// range is refused later.
fn smallest_plan(model: &Model, config: &EngineConfig) -> Result<Plan, PlanError> {
    let model_context = model.facts().context_tokens;
    let context_tokens = config.context_of(model_context).clamp(1, model_context.max(1));
    let limits = Limits { rows: 1, sequences: 1, logits_rows: 1 };
    let plan = model.plan(&PlanRequest { context_tokens, limits, fused: FusedOps::NONE })?;
    Ok(plan.with_layer_classes())
}

/// Rows of logits that verify draft tokens in a step, beside one row for each sequence.
pub(crate) fn draft_rows(speculation: Option<&Speculation>) -> usize {
    if speculation.is_some() { MAX_VERIFY_ROWS } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::EngineMetrics;
    use std::path::Path;
    use std::sync::Arc;
    use trustformers_model::seeded::SeededModel;
    use trustformers_plan::oracle::Oracle;

    fn model() -> Arc<Model> {
        let file = Arc::new(SeededModel::default().gguf());
        Arc::new(Model::from_bytes(Path::new("seeded.gguf"), file).unwrap())
    }

    #[tokio::test]
    async fn the_estimate_is_what_the_engine_takes() {
        for speculation in [None, Some(Speculation::Ngram), Some(Speculation::Draft(model()))] {
            let config = EngineConfig { speculation, ..EngineConfig::default() };
            let estimate = Engine::estimate(&model(), &Oracle::new(), &config).unwrap();
            let metrics = EngineMetrics::register(&prometheus::Registry::new()).unwrap();
            let engine = Engine::start(model(), Box::new(Oracle::new()), &config, &metrics).unwrap();
            let (taken, estimated) = (engine.info().memory, estimate.model.and(&estimate.draft));
            assert_eq!(taken, estimated, "{:?}", config.speculation.is_some());
            engine.stop().await;
        }
    }

    #[test]
    fn a_setting_that_start_refuses_is_refused() {
        let config = EngineConfig { max_batch_size: 0, ..EngineConfig::default() };
        let error = Engine::estimate(&model(), &Oracle::new(), &config).unwrap_err().to_string();
        assert!(error.starts_with("max_batch_size"), "{error}");
    }
}

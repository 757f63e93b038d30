//! Whatever runs a loaded model: the engine of its task, seen from where the task does not matter.

use std::sync::Arc;
use std::time::Duration;

use trustformers_engine::encoder::{Encoder, EncoderMetrics};
use trustformers_engine::{Engine, EngineMetrics, Heartbeat, LoadProgress, MemoryReport};
use trustformers_model::Model;
use trustformers_plan::Backend;
use trustformers_proto::Task;

use crate::failure::Failure;
use crate::probe::{self, GoldenProbe};
use crate::spec::{ModelSpec, TextBatching};

/// A running engine.
#[derive(Debug, Clone)]
pub enum Runner {
    /// It continues texts.
    Generate(Engine),
    /// It turns texts into vectors.
    Embed(Encoder),
    /// It gives texts the scores of labels.
    Classify(Encoder),
    /// It gives pairs of a query and a document a score.
    Rerank(Encoder),
}

/// The series of all engines of a process.
#[derive(Debug, Clone)]
pub struct RunnerMetrics {
    engines: EngineMetrics,
    encoders: EncoderMetrics,
}

impl RunnerMetrics {
    /// Adds the families to a registry.
    ///
    /// # Errors
    /// When the registry already holds families of these names.
    pub fn register(registry: &prometheus::Registry) -> Result<Self, prometheus::Error> {
        let engines = EngineMetrics::register(registry)?;
        Ok(Self { encoders: EncoderMetrics::register(registry, &engines)?, engines })
    }
}

impl Runner {
    /// Puts a model on a device, with the engine of its task.
    ///
    /// # Errors
    /// Whatever stands in the way, with its reason.
    pub fn start(
        model: Model,
        backend: Box<dyn Backend>,
        spec: &ModelSpec,
        metrics: &RunnerMetrics,
        progress: Box<dyn FnMut(LoadProgress) + Send>,
    ) -> Result<Self, Failure> {
        let (task, model) = (model.task(), Arc::new(model));
        Ok(match task {
            Task::Generate => {
                if spec.batching != TextBatching::default() {
                    tracing::warn!(
                        model = spec.name(),
                        batching = ?spec.batching,
                        "generation is batched continuously: strategy, waiting time and priority of batching are for models that read texts and generate none, and do nothing here"
                    );
                }
                let engines = &metrics.engines;
                Self::Generate(Engine::start_with_progress(
                    model,
                    backend,
                    &spec.engine_config(),
                    engines,
                    progress,
                )?)
            }
            Task::Embed | Task::Classify | Task::Rerank => {
                let config = spec.encoder_config();
                let encoder = Encoder::start(model, backend, &config, &metrics.encoders, progress)?;
                match task {
                    Task::Classify => Self::Classify(encoder),
                    Task::Rerank => Self::Rerank(encoder),
                    Task::Generate | Task::Embed => Self::Embed(encoder),
                }
            }
        })
    }

    /// What it does.
    pub fn task(&self) -> Task {
        match self {
            Self::Generate(_) => Task::Generate,
            Self::Embed(_) => Task::Embed,
            Self::Classify(_) => Task::Classify,
            Self::Rerank(_) => Task::Rerank,
        }
    }

    /// The model it runs.
    pub fn model(&self) -> &Arc<Model> {
        match self {
            Self::Generate(engine) => engine.model(),
            Self::Embed(encoder) | Self::Classify(encoder) | Self::Rerank(encoder) => encoder.model(),
        }
    }

    /// The device in its own words.
    pub fn device(&self) -> &str {
        match self {
            Self::Generate(engine) => &engine.info().device,
            Self::Embed(encoder) | Self::Classify(encoder) | Self::Rerank(encoder) => &encoder.info().device,
        }
    }

    /// Longest sequence or text in tokens.
    pub fn context_tokens(&self) -> usize {
        match self {
            Self::Generate(engine) => engine.info().context_tokens,
            Self::Embed(encoder) | Self::Classify(encoder) | Self::Rerank(encoder) => {
                encoder.info().context_tokens
            }
        }
    }

    /// Bytes that the model takes on the device.
    pub fn memory(&self) -> &MemoryReport {
        match self {
            Self::Generate(engine) => &engine.info().memory,
            Self::Embed(encoder) | Self::Classify(encoder) | Self::Rerank(encoder) => &encoder.info().memory,
        }
    }

    /// Signs of life.
    pub fn heartbeat(&self) -> Heartbeat {
        match self {
            Self::Generate(engine) => engine.heartbeat(),
            Self::Embed(encoder) | Self::Classify(encoder) | Self::Rerank(encoder) => encoder.heartbeat(),
        }
    }

    /// Runs a small request through the whole path and gives the time that it took.
    ///
    /// # Errors
    /// The device or the model is broken, or the engine ends.
    pub async fn warm_up(&self) -> Result<Duration, Failure> {
        Ok(match self {
            Self::Generate(engine) => engine.warm_up().await?,
            Self::Embed(encoder) | Self::Classify(encoder) | Self::Rerank(encoder) => {
                encoder.warm_up().await?
            }
        })
    }

    /// Compares the greedy answer to a prompt with the one that is known.
    ///
    /// # Errors
    /// `WrongAnswer` with both, or whatever stood in the way of the answer.
    pub async fn check_golden(&self, golden: &GoldenProbe) -> Result<(), Failure> {
        match self {
            Self::Generate(engine) => probe::check(engine, golden).await,
            Self::Embed(_) | Self::Classify(_) | Self::Rerank(_) => Err(Failure::permanent(
                "InvalidConfiguration",
                "the probe compares a text that is generated, and this model generates none; leave it out",
            )),
        }
    }

    /// Ends the engine; what it was answering ends with an error.
    pub async fn stop(&self) {
        match self {
            Self::Generate(engine) => engine.stop().await,
            Self::Embed(encoder) | Self::Classify(encoder) | Self::Rerank(encoder) => encoder.stop().await,
        }
    }

    /// Says in the log how the engine was made.
    pub(crate) fn log_sizes(&self, name: &str) {
        match self {
            Self::Generate(engine) => {
                let info = engine.info();
                tracing::info!(
                    model = name,
                    context_tokens = info.context_tokens,
                    max_batch_size = info.max_batch_size,
                    max_queue = info.max_queue,
                    token_budget = info.token_budget,
                    kv_blocks = info.kv_blocks,
                    "generation engine"
                );
            }
            Self::Embed(encoder) | Self::Classify(encoder) | Self::Rerank(encoder) => {
                let info = encoder.info();
                tracing::info!(
                    model = name,
                    strategy = info.strategy.as_str(),
                    max_wait_ms = info.max_wait.as_millis(),
                    priority = info.priority,
                    context_tokens = info.context_tokens,
                    max_batch_size = info.max_batch_size,
                    max_queue = info.max_queue,
                    token_budget = info.token_budget,
                    "encoder engine"
                );
                let note = encoder
                    .model()
                    .facts()
                    .embedding
                    .as_ref()
                    .and_then(|facts| facts.pooling_note.as_deref());
                if let Some(note) = note {
                    tracing::warn!(model = name, "{note}");
                }
            }
        }
    }
}

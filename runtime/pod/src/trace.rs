//! The spans of a generation: one for each phase, with an event for each step of the engine.

use trustformers_api::{ApiError, Event, Generation, Prompt};
use trustformers_engine::{GenerationObserver, GenerationOutcome, GenerationProgress};
use trustformers_telemetry::traces::{SpanGuard, Trace};

/// What OpenTelemetry's conventions call this server.
const PROVIDER: &str = "trustformers";

/// Opens and closes the spans of one generation as the engine tells its course.
#[derive(Debug)]
pub(crate) struct PhaseSpans {
    /// The span of the request.
    request: Trace,
    /// The span of the phase that it is in.
    span: SpanGuard,
    phase: Phase,
    /// Whether its first token is there.
    answers: bool,
}

/// A phase; its word is the name of its span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Queue,
    Prefill,
    Decode,
}

impl Phase {
    fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

impl PhaseSpans {
    /// Those of a request that is being submitted; none where it is not traced.
    pub(crate) fn of(request: &Trace) -> Option<Box<dyn GenerationObserver>> {
        if !request.is_recorded() {
            return None;
        }
        let phase = Phase::Queue;
        let span = request.child(phase.as_str());
        Some(Box::new(Self { request: request.clone(), span, phase, answers: false }))
    }

    fn enter(&mut self, phase: Phase) {
        if self.phase != phase {
            self.end_phase();
            self.span = self.request.child(phase.as_str());
            self.phase = phase;
        }
    }

    /// A phase ends before the next one begins, so that they do not overlap.
    fn end_phase(&mut self) {
        drop(std::mem::take(&mut self.span));
    }

    /// The phase of a generation that the engine computes; after a preemption it may be the prompt again.
    fn computed(&self) -> Phase {
        if self.answers { Phase::Decode } else { Phase::Prefill }
    }
}

impl GenerationObserver for PhaseSpans {
    fn observe(&mut self, progress: GenerationProgress) {
        match progress {
            GenerationProgress::Started => self.enter(self.computed()),
            GenerationProgress::Step { rows, sequences } => {
                self.enter(self.computed());
                let figure = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
                self.span.event("step", [("rows", figure(rows)), ("sequences", figure(sequences))]);
            }
            GenerationProgress::FirstToken => {
                self.answers = true;
                self.enter(Phase::Decode);
            }
            GenerationProgress::Preempted => self.enter(Phase::Queue),
            GenerationProgress::Ended(outcome) => {
                match outcome {
                    GenerationOutcome::Stop | GenerationOutcome::Length => {}
                    failed => self.span.fail(failed.as_str()),
                }
                self.span.set("trustformers.outcome", outcome.as_str());
                self.end_phase();
            }
        }
    }
}

/// The attributes of OpenTelemetry's conventions that are known before the answer, where they are wanted.
pub(crate) fn describe_request(request: &Trace, generation: &Generation, served: &str) {
    if !request.wants_model_attributes() {
        return;
    }
    let operation = match generation.prompt {
        Prompt::Conversation(_) => "chat",
        Prompt::Text(_) | Prompt::Tokens(_) => "text_completion",
    };
    request.set("gen_ai.operation.name", operation);
    request.set("gen_ai.provider.name", PROVIDER);
    if let Some(asked) = &generation.model {
        request.set("gen_ai.request.model", asked.clone());
    }
    request.set("gen_ai.response.model", served.to_owned());
    request.set("gen_ai.request.max_tokens", i64::from(generation.max_tokens));
    request.set("gen_ai.request.temperature", f64::from(generation.temperature));
    request.set("gen_ai.request.top_p", f64::from(generation.top_p));
}

/// Those that are known at the end.
pub(crate) fn describe_end(request: &Trace, event: &Result<Event, ApiError>) {
    match event {
        Ok(Event::Finished { reason, usage, .. }) if request.wants_model_attributes() => {
            request.set_words("gen_ai.response.finish_reasons", [reason.as_str()]);
            request.set("gen_ai.usage.input_tokens", i64::from(usage.prompt_tokens));
            request.set("gen_ai.usage.output_tokens", i64::from(usage.completion_tokens));
        }
        _ => {}
    }
}

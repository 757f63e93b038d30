//! A span under way, its children, and its way to other services.

use std::borrow::Cow;
use std::ops::Deref;
use std::sync::Arc;

use http::{HeaderMap, HeaderName};
use opentelemetry::baggage::BaggageExt;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{SpanKind, Status, TraceContextExt, Tracer};
use opentelemetry::{Array, Context, Key, KeyValue, StringValue, Value};
use opentelemetry_http::HeaderInjector;
use opentelemetry_sdk::propagation::{BaggagePropagator, TraceContextPropagator};

use super::{Traces, Tracing};

/// Longest `tracestate` that is taken over; W3C wants at least this much. Each waiting span has a copy.
const MAX_TRACESTATE_BYTES: usize = 512;
/// Longest value of baggage as an attribute.
const MAX_BAGGAGE_CHARS: usize = 256;

/// The headers of a caller, without a state that is too long to keep.
struct BoundedHeaders<'a>(&'a HeaderMap);

impl Extractor for BoundedHeaders<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let value = self.0.get(key)?.to_str().ok()?;
        (key != "tracestate" || value.len() <= MAX_TRACESTATE_BYTES).then_some(value)
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

tokio::task_local! {
    /// The span of the request that the task is handling.
    static CURRENT: Trace;
}

/// A span as its children see it, or nothing; cheap to clone. It does not keep the span open.
#[derive(Debug, Clone, Default)]
pub struct Trace(Option<Arc<Opened>>);

#[derive(Debug)]
struct Opened {
    tracing: Arc<Tracing>,
    context: Context,
}

/// A span that ends when this is dropped.
#[derive(Debug, Default)]
pub struct SpanGuard(Trace);

impl Deref for SpanGuard {
    type Target = Trace;

    fn deref(&self) -> &Trace {
        &self.0
    }
}

impl Drop for SpanGuard {
    fn drop(&mut self) {
        if let Some(opened) = &self.0.0 {
            opened.context.span().end();
        }
    }
}

impl Traces {
    /// Begins the trace of something that no caller asked for.
    pub fn root(&self, name: impl Into<Cow<'static, str>>) -> SpanGuard {
        self.open(name.into(), SpanKind::Internal, &Context::new())
    }

    /// Begins the span of a request that has come with these headers: as a part of its caller's trace where
    /// they name one.
    pub fn request(&self, headers: &HeaderMap, name: impl Into<Cow<'static, str>>) -> SpanGuard {
        let Some(tracing) = &self.0 else { return SpanGuard::default() };
        let extractor = BoundedHeaders(headers);
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &extractor);
        let span = self.open(name.into(), SpanKind::Server, &parent);
        if span.is_recorded() && !tracing.baggage_keys.is_empty() {
            let baggage = BaggagePropagator::new().extract_with_context(&Context::new(), &extractor);
            for key in &tracing.baggage_keys {
                if let Some(value) = baggage.baggage().get(key) {
                    let value: String = value.as_str().chars().take(MAX_BAGGAGE_CHARS).collect();
                    span.set(format!("baggage.{key}"), value);
                }
            }
        }
        span
    }

    fn open(&self, name: Cow<'static, str>, kind: SpanKind, parent: &Context) -> SpanGuard {
        let Some(tracing) = &self.0 else { return SpanGuard::default() };
        let builder = tracing.tracer.span_builder(name).with_kind(kind);
        let span = tracing.tracer.build_with_context(builder, parent);
        let opened = Opened { tracing: Arc::clone(tracing), context: parent.with_span(span) };
        SpanGuard(Trace(Some(Arc::new(opened))))
    }
}

impl Trace {
    /// The span of the request that this task is handling; nothing outside of requests.
    pub fn current() -> Self {
        CURRENT.try_with(Self::clone).unwrap_or_default()
    }

    /// Runs a future in which this is the current span.
    pub async fn scope<F: Future>(self, future: F) -> F::Output {
        CURRENT.scope(self, future).await
    }

    /// Runs a function in which this is the current span.
    pub fn scope_sync<T>(self, run: impl FnOnce() -> T) -> T {
        CURRENT.sync_scope(self, run)
    }

    /// Whether the span goes anywhere: traces are on, and this one is sampled.
    pub fn is_recorded(&self) -> bool {
        self.0.as_ref().is_some_and(|opened| opened.context.span().is_recording())
    }

    /// Whether attributes `gen_ai.*` are wanted.
    pub fn wants_model_attributes(&self) -> bool {
        self.0.as_ref().is_some_and(|opened| opened.tracing.model_attributes) && self.is_recorded()
    }

    /// Begins a part of this span.
    pub fn child(&self, name: impl Into<Cow<'static, str>>) -> SpanGuard {
        self.part(name.into(), SpanKind::Internal)
    }

    /// Begins a call of another service, whose headers get it by [`Trace::inject`].
    pub fn call(&self, name: impl Into<Cow<'static, str>>) -> SpanGuard {
        self.part(name.into(), SpanKind::Client)
    }

    fn part(&self, name: Cow<'static, str>, kind: SpanKind) -> SpanGuard {
        let Some(opened) = &self.0 else { return SpanGuard::default() };
        let traces = Traces(Some(Arc::clone(&opened.tracing)));
        traces.open(name, kind, &opened.context)
    }

    /// Says in the headers of a call which span it belongs to. `baggage` stays as it is.
    pub fn inject(&self, headers: &mut HeaderMap) {
        if let Some(opened) = &self.0 {
            TraceContextPropagator::new().inject_context(&opened.context, &mut HeaderInjector(headers));
        }
    }

    /// Adds or replaces an attribute.
    pub fn set(&self, key: impl Into<Key>, value: impl Into<Value>) {
        if let Some(opened) = &self.0 {
            opened.context.span().set_attribute(KeyValue::new(key, value));
        }
    }

    /// Adds or replaces an attribute that is a list of words.
    pub fn set_words<const N: usize>(&self, key: &'static str, words: [&'static str; N]) {
        let words = words.into_iter().map(StringValue::from).collect();
        self.set(key, Value::Array(Array::String(words)));
    }

    /// Notes that something has happened now, with figures about it.
    pub fn event<const N: usize>(&self, name: &'static str, figures: [(&'static str, i64); N]) {
        if let Some(opened) = &self.0 {
            let figures = figures.into_iter().map(|(key, value)| KeyValue::new(key, value)).collect();
            opened.context.span().add_event(name, figures);
        }
    }

    /// Marks the span as failed. `kind` is a word of a small set, never a text of the request.
    pub fn fail(&self, kind: impl Into<Cow<'static, str>>) {
        if let Some(opened) = &self.0 {
            let kind = kind.into();
            let span = opened.context.span();
            span.set_attribute(KeyValue::new("error.type", kind.clone().into_owned()));
            span.set_status(Status::error(kind));
        }
    }
}

//! The encoder engine with a tiny seeded model: batches, requests of many texts, cancellation, overload,
//! failures, stopping, and that a text gives the same bits whatever else is in its step.

#![expect(clippy::unwrap_used, reason = "a test ends by panicking")]

mod stepped;

use futures::FutureExt;
use prometheus::Registry;
use proptest::prelude::{ProptestConfig, prop, proptest};
use std::sync::Arc;
use std::time::Duration;
use stepped::{StepControl, Verdict, stepped};
use trustformers_cpu::{CpuBackend, CpuConfig};
use trustformers_engine::encoder::{
    BatchStrategy, EncodeError, EncodeParams, Encoded, Encoder, EncoderConfig, EncoderMetrics,
};
use trustformers_engine::{EngineMetrics, Numerics, Priority, Prompt, RequestFault, StartError};
use trustformers_model::Model;
use trustformers_model::seeded::{SeededEncoder, SeededModel};
use trustformers_plan::Backend;
use trustformers_plan::oracle::Oracle;

fn model() -> Arc<Model> {
    let folder = tempfile::tempdir().unwrap();
    SeededEncoder::default().write(folder.path()).unwrap();
    Arc::new(Model::load(folder.path(), &mut |_| {}).unwrap())
}

fn config(strategy: BatchStrategy) -> EncoderConfig {
    EncoderConfig {
        model_label: "m".into(),
        strategy,
        max_batch_size: 4,
        max_wait_ms: 1000,
        numerics: Numerics::Exact,
        ..EncoderConfig::default()
    }
}

fn start_on(backend: Box<dyn Backend>, config: &EncoderConfig) -> (Encoder, Registry) {
    let registry = Registry::new();
    let engines = EngineMetrics::register(&registry).unwrap();
    let metrics = EncoderMetrics::register(&registry, &engines).unwrap();
    (Encoder::start(model(), backend, config, &metrics, Box::new(|_| {})).unwrap(), registry)
}

fn start_stepped(config: &EncoderConfig) -> (Encoder, StepControl, Registry) {
    let (backend, steps) = stepped();
    let (encoder, registry) = start_on(backend, config);
    (encoder, steps, registry)
}

/// The value of a counter or gauge, or the samples of a histogram; with several outcomes, of that one.
fn value(registry: &Registry, name: &str, outcome: Option<&str>) -> f64 {
    let families = registry.gather();
    let family = families.iter().find(|family| family.name() == name).unwrap();
    let metric = family.get_metric().iter().find(|metric| {
        outcome.is_none_or(|wanted| metric.get_label().iter().any(|label| label.value() == wanted))
    });
    let metric = metric.unwrap();
    metric.get_counter().get_value()
        + metric.get_gauge().get_value()
        + metric.get_histogram().get_sample_count() as f64
}

fn ids(len: usize, salt: usize) -> Prompt {
    Prompt::Tokens((0..len).map(|i| 5 + ((i * 31 + salt * 17) % 40) as u32).collect())
}

fn request(texts: Vec<Prompt>) -> EncodeParams {
    EncodeParams::inputs(texts.into_iter().map(Into::into).collect())
}

/// Texts of these lengths in tokens, of this tenant.
fn texts_of(tenant: &str, lengths: impl IntoIterator<Item = usize>) -> EncodeParams {
    EncodeParams {
        tenant: tenant.to_owned(),
        ..request(lengths.into_iter().map(|len| ids(len, 1)).collect())
    }
}

fn one_text(len: usize, salt: usize) -> EncodeParams {
    request(vec![ids(len, salt)])
}

#[tokio::test]
async fn texts_of_every_kind_become_rows_of_unit_length() {
    let (encoder, registry) = start_on(Box::new(Oracle::new()), &config(BatchStrategy::Dynamic));
    encoder.warm_up().await.unwrap();
    let texts = ["hello world", "", "the cat", &"cat ".repeat(200), "hello world", "🦀 \u{4e16}"];
    let encoded = encoder.submit(&EncodeParams::texts(texts)).unwrap().await.unwrap();
    assert_eq!((encoded.width, encoded.rows().len()), (64, 6));
    for row in encoded.rows() {
        let length = row.iter().map(|value| value * value).sum::<f32>().sqrt();
        assert!((length - 1.0).abs() < 1e-4, "{length}");
    }
    let rows: Vec<_> = encoded.rows().collect();
    assert_eq!(rows[0], rows[4]);
    assert!((0..4).all(|i| rows[i] != rows[i + 1]));
    assert_eq!(encoded.truncated, [3], "truncation is reported");
    assert!(encoded.tokens > 64 + 2 * 2 && encoded.tokens < 64 + 40, "{}", encoded.tokens);
    assert_eq!(
        value(&registry, "trustformers_requests_total", Some("done")),
        1.0,
        "the warm-up is not counted"
    );
    assert_eq!(value(&registry, "trustformers_prompt_tokens_total", None), encoded.tokens as f64);
    assert_eq!(encoder.in_flight(), 0);
}

#[test]
fn a_full_batch_runs_at_once_and_the_rest_keeps_its_order() {
    let (encoder, steps, registry) = start_stepped(&config(BatchStrategy::Size));
    let list = encoder.submit(&request((0..6).map(|i| ids(3 + i, i)).collect())).unwrap();
    assert_eq!(steps.run_step(), [3, 4, 5, 6]);
    let more = [7, 8].map(|len| encoder.submit(&one_text(len, len)).unwrap());
    assert_eq!(steps.run_step(), [7, 8, 7, 8]);
    let encoded = list.blocking_wait().unwrap();
    assert_eq!((encoded.rows().len(), encoded.tokens), (6, 33));
    more.into_iter().for_each(|encoding| drop(encoding.blocking_wait().unwrap()));
    assert_eq!(value(&registry, "trustformers_batch_texts", None), 2.0);
    assert_eq!(value(&registry, "trustformers_queue_wait_seconds", None), 3.0);
}

#[test]
fn the_end_of_a_window_starts_a_step() {
    let window = EncoderConfig { max_wait_ms: 1, ..config(BatchStrategy::Time) };
    let (encoder, steps, _registry) = start_stepped(&window);
    let alone = encoder.submit(&one_text(3, 1)).unwrap();
    assert_eq!(steps.next_step().sequences(), 1);
    // Three arrive while the first is computed.
    let waiting = [4, 5, 6].map(|len| encoder.submit(&one_text(len, 1)).unwrap());
    steps.decide(Verdict::Run);
    assert_eq!(steps.run_step(), [4, 5, 6]);
    alone.blocking_wait().unwrap();
    waiting.into_iter().for_each(|encoding| drop(encoding.blocking_wait().unwrap()));
}

#[test]
fn sparse_requests_run_at_once_in_the_dynamic_window() {
    // A window would last a second; each request runs long before that.
    let (encoder, steps, _registry) = start_stepped(&config(BatchStrategy::Dynamic));
    for len in 3..9 {
        let encoding = encoder.submit(&one_text(len, 1)).unwrap();
        assert_eq!(steps.run_step(), [len]);
        let encoded = encoding.blocking_wait().unwrap();
        assert!(encoded.timings.queue.as_millis() < 500, "{:?}", encoded.timings);
    }
}

#[test]
fn texts_of_class_high_run_first_where_classes_count() {
    for (priority, wanted) in [(true, [9, 9, 3, 4]), (false, [3, 4, 5, 6])] {
        let by_class = EncoderConfig { priority, max_batch_size: 4, ..config(BatchStrategy::Size) };
        let (encoder, steps, _registry) = start_stepped(&by_class);
        let first = encoder.submit(&request((0..4).map(|i| ids(2, i)).collect())).unwrap();
        steps.next_step();
        let normal: Vec<_> = (3..7).map(|len| encoder.submit(&one_text(len, 1)).unwrap()).collect();
        let urgent = EncodeParams { priority: Priority::High, ..request(vec![ids(9, 1), ids(9, 2)]) };
        let urgent = encoder.submit(&urgent).unwrap();
        steps.decide(Verdict::Run);
        assert_eq!(steps.run_step(), wanted);
        drop((steps, first, normal, urgent));
    }
}

#[tokio::test]
async fn a_cancelled_request_removes_its_uncomputed_texts() {
    let (encoder, steps, registry) = start_stepped(&config(BatchStrategy::Size));
    let long = encoder.submit(&request((0..10).map(|i| ids(5, i)).collect())).unwrap();
    assert_eq!(steps.next_step().sequences(), 4);
    let stays = encoder.submit(&request((0..4).map(|i| ids(7, i)).collect())).unwrap();
    drop(long);
    steps.decide(Verdict::Run);
    assert_eq!(steps.run_step(), [7, 7, 7, 7]);
    stays.await.unwrap();
    assert_eq!(value(&registry, "trustformers_requests_total", Some("cancelled")), 1.0);
    assert_eq!(value(&registry, "trustformers_requests_running", None), 0.0);
    assert_eq!(value(&registry, "trustformers_requests_waiting", None), 0.0);
    assert_eq!(encoder.in_flight(), 0);
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_and_has_room_later() {
    let (encoder, steps, registry) =
        start_stepped(&EncoderConfig { max_queue: 2, ..config(BatchStrategy::Dynamic) });
    let first = encoder.submit(&request((0..4).map(|i| ids(5, i)).collect())).unwrap();
    steps.next_step();
    // One of two permits is free: a request of many texts is still admitted, and none after it.
    let waiting = [1, 5].map(|texts| encoder.submit(&request(vec![ids(4, texts); texts])).unwrap());
    let refused = encoder.submit(&one_text(4, 9)).unwrap_err();
    // Nothing has been computed yet, so the estimate is the minimum.
    assert_eq!(refused, EncodeError::Overloaded { waiting: 6, retry_after: Duration::from_secs(1) });
    assert_eq!(value(&registry, "trustformers_requests_total", Some("overloaded")), 1.0);
    assert_eq!(value(&registry, "trustformers_requests_waiting", None), 2.0);
    let beat = encoder.heartbeat();
    assert!(beat.work_pending && beat.alive);
    drop(steps);
    first.await.unwrap();
    for encoding in waiting {
        encoding.await.unwrap();
    }
    encoder.submit(&one_text(4, 9)).unwrap().await.unwrap();
    assert!(!encoder.heartbeat().work_pending);
}

#[tokio::test]
async fn many_texts_leave_room_in_steps_and_in_the_queue() {
    let (encoder, steps, _registry) =
        start_stepped(&EncoderConfig { max_queue: 2, ..config(BatchStrategy::Dynamic) });
    let long = encoder.submit(&texts_of("a", vec![3; 20])).unwrap();
    assert_eq!(steps.next_step().sequences(), 4);
    // One tenant's texts exceed the queue three times. Texts of another tenant are still admitted and share
    // the next step.
    let single = encoder.submit(&texts_of("b", [5])).unwrap();
    assert!(matches!(encoder.submit(&texts_of("a", [3])), Err(EncodeError::Overloaded { .. })));
    let another = encoder.submit(&texts_of("c", [7])).unwrap();
    assert!(
        matches!(encoder.submit(&texts_of("d", [9])), Err(EncodeError::Overloaded { .. })),
        "two extra permits"
    );
    steps.decide(Verdict::Run);
    assert_eq!(steps.run_step(), [3, 5, 7, 3]);
    let (single, another) = (single.await.unwrap(), another.await.unwrap());
    assert_eq!((single.tokens, another.tokens), (5, 7));
    drop(steps);
    assert_eq!(long.await.unwrap().rows().len(), 20);
    assert_eq!(encoder.in_flight(), 0);
}

#[tokio::test]
async fn a_full_queue_admits_a_higher_class_where_classes_count() {
    for strategy in [BatchStrategy::Priority, BatchStrategy::Dynamic] {
        let (encoder, steps, _registry) = start_stepped(&EncoderConfig { max_queue: 1, ..config(strategy) });
        let waiting = [2, 3, 4].map(|len| encoder.submit(&texts_of("a", vec![len; 4])));
        let [Ok(first), Ok(second), Err(EncodeError::Overloaded { .. })] = waiting else {
            panic!("{waiting:?}")
        };
        steps.next_step();
        let urgent = EncodeParams { priority: Priority::High, ..texts_of("a", [9]) };
        let urgent = encoder.submit(&urgent);
        assert_eq!(urgent.is_ok(), strategy == BatchStrategy::Priority, "{urgent:?}");
        steps.decide(Verdict::Run);
        let wanted: &[usize] = if urgent.is_ok() { &[9, 3, 3, 3] } else { &[3, 3, 3, 3] };
        assert_eq!(steps.run_step(), wanted);
        drop(steps);
        first.await.unwrap();
        second.await.unwrap();
    }
}

#[tokio::test]
async fn a_failed_step_ends_its_requests_and_no_others() {
    let (encoder, steps, registry) = start_stepped(&config(BatchStrategy::Size));
    for (verdict, text) in [(Verdict::Fail, "pulled the plug"), (Verdict::Poison, "not a finite number")] {
        let failed_request = encoder.submit(&request((0..6).map(|i| ids(5, i)).collect())).unwrap();
        steps.next_step();
        let other = encoder.submit(&request((0..4).map(|i| ids(6, i)).collect())).unwrap();
        steps.decide(verdict);
        let error = failed_request.await.unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
        assert_eq!(steps.run_step(), [6, 6, 6, 6]);
        other.await.unwrap();
    }
    assert_eq!(value(&registry, "trustformers_requests_total", Some("failed")), 2.0);
    assert_eq!(value(&registry, "trustformers_failed_steps_total", None), 1.0);
    assert_eq!(encoder.heartbeat().failed_steps, 0, "good steps followed");
    for failed in 1..=2 {
        let failed_request = encoder.submit(&request((0..4).map(|i| ids(5, i)).collect())).unwrap();
        steps.next_step();
        steps.decide(Verdict::Fail);
        failed_request.await.unwrap_err();
        assert_eq!(encoder.heartbeat().failed_steps, failed);
    }
    let last = encoder.submit(&request((0..4).map(|i| ids(5, i)).collect())).unwrap();
    steps.next_step();
    steps.decide(Verdict::Panic);
    assert_eq!(last.await.unwrap_err(), EncodeError::Stopped);
    // The thread ends after its requests have their errors.
    encoder.stop().await;
    assert!(!encoder.heartbeat().alive);
    assert_eq!(encoder.submit(&one_text(4, 9)).unwrap_err(), EncodeError::Stopped);
}

#[tokio::test]
async fn a_refused_step_ends_one_request_and_never_counts_as_failed() {
    let (encoder, steps, registry) = start_stepped(&config(BatchStrategy::Size));
    for _ in 0..4 {
        let refused = encoder.submit(&request(vec![ids(5, 1), ids(6, 2)])).unwrap();
        let others = encoder.submit(&request(vec![ids(7, 3), ids(8, 4)])).unwrap();
        assert_eq!(steps.next_step().sequences(), 4);
        // A row of the second text.
        steps.decide(Verdict::RefuseRow(6));
        assert_eq!(steps.run_step(), [7, 8], "the step is submitted again without the refused request");
        let error = refused.await.unwrap_err();
        assert!(matches!(error, EncodeError::Request(RequestFault::RefusedStep { .. })), "{error}");
        assert_eq!(others.await.unwrap().tokens, 15);
        assert_eq!(encoder.heartbeat().failed_steps, 0);
    }
    assert_eq!(value(&registry, "trustformers_failed_steps_total", None), 0.0);
    assert_eq!(value(&registry, "trustformers_requests_total", Some("failed")), 4.0);
    let all = encoder.submit(&request((0..4).map(|i| ids(5, i)).collect())).unwrap();
    steps.next_step();
    steps.decide(Verdict::RefuseRow(0));
    all.await.unwrap_err();
    drop(steps);
    encoder.drain().await;
    assert_eq!((encoder.heartbeat().failed_steps, encoder.in_flight()), (0, 0));
}

#[tokio::test]
async fn a_request_that_cannot_be_encoded_is_refused_by_name() {
    let (encoder, _registry) = start_on(Box::new(Oracle::new()), &config(BatchStrategy::Dynamic));
    let error = |params: EncodeParams| encoder.submit(&params).unwrap_err().to_string();
    assert!(error(request(Vec::new())).starts_with("input: 0 texts"));
    assert!(error(EncodeParams::texts(vec!["a"; 2049])).contains("2048"));
    assert!(error(request(vec![Prompt::Tokens(vec![1, 70_000])])).contains("70000"));
    assert!(error(request(vec![Prompt::Tokens(Vec::new())])).contains("empty"));
    assert!(error(texts_of(&"a".repeat(257), [3])).starts_with("tenant: 257 bytes"));
    let strict = EncodeParams { truncate: false, ..request(vec![ids(3, 1), ids(65, 1)]) };
    assert!(error(strict.clone()).starts_with("text 1 has more than the 64 tokens"));
    let cut = encoder.submit(&EncodeParams { truncate: true, ..strict }).unwrap().await.unwrap();
    assert_eq!((cut.tokens, cut.truncated), (67, vec![1]));
    assert_eq!(encoder.in_flight(), 0);
}

#[tokio::test]
async fn stopping_ends_requests_and_dropping_handles_answers_them() {
    let (encoder, steps, _registry) = start_stepped(&config(BatchStrategy::Size));
    let waiting = encoder.submit(&one_text(4, 1)).unwrap();
    encoder.stop().await;
    assert_eq!(waiting.await.unwrap_err(), EncodeError::Stopped);
    drop(steps);

    // Once all handles are dropped no other text can arrive, so the window ends at once.
    let (encoder, steps, _registry) = start_stepped(&config(BatchStrategy::Size));
    let waiting = encoder.submit(&one_text(4, 1)).unwrap();
    drop(encoder);
    assert_eq!(steps.run_step(), [4]);
    waiting.await.unwrap();
}

#[test]
fn a_model_that_generates_text_is_no_encoder() {
    let file = SeededModel::default().gguf();
    let model = Model::from_bytes(std::path::Path::new("m.gguf"), Arc::new(file)).unwrap();
    let metrics = EncoderMetrics::unregistered().unwrap();
    let started = Encoder::start(
        Arc::new(model),
        Box::new(Oracle::new()),
        &EncoderConfig::default(),
        &metrics,
        Box::new(|_| {}),
    );
    assert!(matches!(started, Err(StartError::Invalid { field: "model", .. })), "{started:?}");
}

fn encode(encoder: &Encoder, params: &EncodeParams) -> Encoded {
    encoder.submit(params).unwrap().blocking_wait().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Texts of any lengths, divided into requests in any way, have the bits that they have alone.
    #[test]
    fn a_text_has_the_same_bits_alone_and_in_a_batch(
        lengths in prop::collection::vec(1usize..=64, 1..24),
        cut in 1usize..8,
        max_batch_size in 1usize..=8,
    ) {
        let backend = || Box::new(CpuBackend::new(CpuConfig { threads: Some(2), ..CpuConfig::default() }).unwrap());
        let alone = config(BatchStrategy::Dynamic);
        let (alone, _) = start_on(backend(), &EncoderConfig { max_batch_size: 1, ..alone });
        let batched = config(BatchStrategy::Size);
        let batched = EncoderConfig { max_batch_size, max_wait_ms: 1, token_budget: Some(150), ..batched };
        let (batched, _) = start_on(backend(), &batched);
        let texts: Vec<_> = lengths.iter().enumerate().map(|(salt, len)| ids(*len, salt)).collect();
        let together: Vec<_> =
            texts.chunks(cut).map(|texts| batched.submit(&request(texts.to_vec())).unwrap()).collect();
        let together: Vec<f32> =
            together.into_iter().flat_map(|encoding| encoding.blocking_wait().unwrap().values).collect();
        let singly: Vec<f32> =
            texts.into_iter().flat_map(|text| encode(&alone, &request(vec![text])).values).collect();
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&together), bits(&singly));
    }
}

#[tokio::test]
async fn an_encoding_is_pending_until_its_step_is_done() {
    let (encoder, steps, _registry) = start_stepped(&config(BatchStrategy::Dynamic));
    let mut encoding = encoder.submit(&one_text(4, 1)).unwrap();
    steps.next_step();
    assert!((&mut encoding).now_or_never().is_none());
    steps.decide(Verdict::Run);
    encoding.await.unwrap();
}

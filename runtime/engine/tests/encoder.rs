//! The encoder engine with a tiny seeded model: batches, lists, cancellation, overload, failure, ending, and that a
//! text gives the same bits whoever shares its step.

#![expect(clippy::unwrap_used, reason = "a test ends by panicking")]

mod gate;

use futures::FutureExt;
use gate::{Gate, Verdict, gated};
use prometheus::Registry;
use proptest::prelude::{ProptestConfig, prop, proptest};
use std::sync::Arc;
use std::time::Duration;
use trustformers_cpu::{CpuBackend, CpuConfig};
use trustformers_engine::encoder::{
    BatchStrategy, EncodeError, EncodeParams, Encoded, Encoder, EncoderConfig, EncoderMetrics,
};
use trustformers_engine::{EngineMetrics, Numerics, Priority, Prompt, StartError};
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

fn start_gated(config: &EncoderConfig) -> (Encoder, Gate, Registry) {
    let (backend, gate) = gated();
    let (encoder, registry) = start_on(backend, config);
    (encoder, gate, registry)
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
    EncodeParams { texts, truncate: true, priority: Priority::Normal, tenant: String::new() }
}

/// Texts of these many tokens, of this tenant.
fn of(tenant: &str, lengths: impl IntoIterator<Item = usize>) -> EncodeParams {
    EncodeParams {
        tenant: tenant.to_owned(),
        ..request(lengths.into_iter().map(|len| ids(len, 1)).collect())
    }
}

fn one(len: usize, salt: usize) -> EncodeParams {
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
    assert_eq!(encoded.truncated, [3], "what is cut is said");
    assert!(encoded.tokens > 64 + 2 * 2 && encoded.tokens < 64 + 40, "{}", encoded.tokens);
    assert_eq!(value(&registry, "trustformers_requests_total", Some("done")), 1.0, "the warm-up is nobody's");
    assert_eq!(value(&registry, "trustformers_prompt_tokens_total", None), encoded.tokens as f64);
    assert_eq!(encoder.in_flight(), 0);
}

#[test]
fn a_full_batch_goes_at_once_and_what_is_left_stays_in_order() {
    let (encoder, gate, registry) = start_gated(&config(BatchStrategy::Size));
    let list = encoder.submit(&request((0..6).map(|i| ids(3 + i, i)).collect())).unwrap();
    assert_eq!(gate.run(), [3, 4, 5, 6]);
    let more = [7, 8].map(|len| encoder.submit(&one(len, len)).unwrap());
    assert_eq!(gate.run(), [7, 8, 7, 8]);
    let encoded = list.blocking_wait().unwrap();
    assert_eq!((encoded.rows().len(), encoded.tokens), (6, 33));
    more.into_iter().for_each(|encoding| drop(encoding.blocking_wait().unwrap()));
    assert_eq!(value(&registry, "trustformers_batch_texts", None), 2.0);
    assert_eq!(value(&registry, "trustformers_queue_wait_seconds", None), 3.0);
}

#[test]
fn a_window_that_ends_takes_who_is_there() {
    let window = EncoderConfig { max_wait_ms: 1, ..config(BatchStrategy::Time) };
    let (encoder, gate, _registry) = start_gated(&window);
    let alone = encoder.submit(&one(3, 1)).unwrap();
    assert_eq!(gate.begun().sequences(), 1);
    // Three come while the first is computed.
    let waiting = [4, 5, 6].map(|len| encoder.submit(&one(len, 1)).unwrap());
    gate.let_it(Verdict::Run);
    assert_eq!(gate.run(), [4, 5, 6]);
    alone.blocking_wait().unwrap();
    waiting.into_iter().for_each(|encoding| drop(encoding.blocking_wait().unwrap()));
}

#[test]
fn sparse_requests_are_computed_at_once_by_the_dynamic_window() {
    // Were there a wait it would last a second, and the test is over long before it in the time of the device.
    let (encoder, gate, _registry) = start_gated(&config(BatchStrategy::Dynamic));
    for len in 3..9 {
        let encoding = encoder.submit(&one(len, 1)).unwrap();
        assert_eq!(gate.run(), [len]);
        let encoded = encoding.blocking_wait().unwrap();
        assert!(encoded.timings.queue.as_millis() < 500, "{:?}", encoded.timings);
    }
}

#[test]
fn urgent_texts_go_first_where_classes_count() {
    for (priority, wanted) in [(true, [9, 9, 3, 4]), (false, [3, 4, 5, 6])] {
        let by_class = EncoderConfig { priority, max_batch_size: 4, ..config(BatchStrategy::Size) };
        let (encoder, gate, _registry) = start_gated(&by_class);
        let first = encoder.submit(&request((0..4).map(|i| ids(2, i)).collect())).unwrap();
        gate.begun();
        let normal: Vec<_> = (3..7).map(|len| encoder.submit(&one(len, 1)).unwrap()).collect();
        let urgent = EncodeParams { priority: Priority::High, ..request(vec![ids(9, 1), ids(9, 2)]) };
        let urgent = encoder.submit(&urgent).unwrap();
        gate.let_it(Verdict::Run);
        assert_eq!(gate.run(), wanted);
        drop((gate, first, normal, urgent));
    }
}

#[tokio::test]
async fn whoever_leaves_takes_the_uncomputed_texts_along() {
    let (encoder, gate, registry) = start_gated(&config(BatchStrategy::Size));
    let long = encoder.submit(&request((0..10).map(|i| ids(5, i)).collect())).unwrap();
    assert_eq!(gate.begun().sequences(), 4);
    let stays = encoder.submit(&request((0..4).map(|i| ids(7, i)).collect())).unwrap();
    drop(long);
    gate.let_it(Verdict::Run);
    assert_eq!(gate.run(), [7, 7, 7, 7]);
    stays.await.unwrap();
    assert_eq!(value(&registry, "trustformers_requests_total", Some("cancelled")), 1.0);
    assert_eq!(value(&registry, "trustformers_requests_running", None), 0.0);
    assert_eq!(value(&registry, "trustformers_requests_waiting", None), 0.0);
    assert_eq!(encoder.in_flight(), 0);
}

#[tokio::test]
async fn more_than_the_queue_is_refused_at_once_and_room_returns() {
    let (encoder, gate, registry) =
        start_gated(&EncoderConfig { max_queue: 2, ..config(BatchStrategy::Dynamic) });
    let first = encoder.submit(&request((0..4).map(|i| ids(5, i)).collect())).unwrap();
    gate.begun();
    // One place is taken of the two: a longer list is still let in, and nobody after it.
    let waiting = [1, 5].map(|texts| encoder.submit(&request(vec![ids(4, texts); texts])).unwrap());
    let refused = encoder.submit(&one(4, 9)).unwrap_err();
    // Nothing has been computed yet, so nothing is known of how long they will take.
    assert_eq!(refused, EncodeError::Overloaded { waiting: 6, retry_after: Duration::from_secs(1) });
    assert_eq!(value(&registry, "trustformers_requests_total", Some("overloaded")), 1.0);
    assert_eq!(value(&registry, "trustformers_requests_waiting", None), 2.0);
    let beat = encoder.heartbeat();
    assert!(beat.work_pending && beat.alive);
    drop(gate);
    first.await.unwrap();
    for encoding in waiting {
        encoding.await.unwrap();
    }
    encoder.submit(&one(4, 9)).unwrap().await.unwrap();
    assert!(!encoder.heartbeat().work_pending);
}

#[tokio::test]
async fn a_long_list_crowds_nobody_out_of_steps_or_of_the_queue() {
    let (encoder, gate, _registry) =
        start_gated(&EncoderConfig { max_queue: 2, ..config(BatchStrategy::Dynamic) });
    let long = encoder.submit(&of("a", vec![3; 20])).unwrap();
    assert_eq!(gate.begun().sequences(), 4);
    // The queue is full three times over with one tenant's texts. Another one's still come in, and share the next step.
    let single = encoder.submit(&of("b", [5])).unwrap();
    assert!(matches!(encoder.submit(&of("a", [3])), Err(EncodeError::Overloaded { .. })));
    let another = encoder.submit(&of("c", [7])).unwrap();
    assert!(matches!(encoder.submit(&of("d", [9])), Err(EncodeError::Overloaded { .. })), "two places more");
    gate.let_it(Verdict::Run);
    assert_eq!(gate.run(), [3, 5, 7, 3]);
    let (single, another) = (single.await.unwrap(), another.await.unwrap());
    assert_eq!((single.tokens, another.tokens), (5, 7));
    drop(gate);
    assert_eq!(long.await.unwrap().rows().len(), 20);
    assert_eq!(encoder.in_flight(), 0);
}

#[tokio::test]
async fn a_full_queue_has_room_for_a_higher_class_only_where_classes_count() {
    for strategy in [BatchStrategy::Priority, BatchStrategy::Dynamic] {
        let (encoder, gate, _registry) = start_gated(&EncoderConfig { max_queue: 1, ..config(strategy) });
        let waiting = [2, 3, 4].map(|len| encoder.submit(&of("a", vec![len; 4])));
        let [Ok(first), Ok(second), Err(EncodeError::Overloaded { .. })] = waiting else {
            panic!("{waiting:?}")
        };
        gate.begun();
        let urgent = EncodeParams { priority: Priority::High, ..of("a", [9]) };
        let urgent = encoder.submit(&urgent);
        assert_eq!(urgent.is_ok(), strategy == BatchStrategy::Priority, "{urgent:?}");
        gate.let_it(Verdict::Run);
        let wanted: &[usize] = if urgent.is_ok() { &[9, 3, 3, 3] } else { &[3, 3, 3, 3] };
        assert_eq!(gate.run(), wanted);
        drop(gate);
        first.await.unwrap();
        second.await.unwrap();
    }
}

#[tokio::test]
async fn a_failed_step_ends_its_requests_and_no_others() {
    let (encoder, gate, registry) = start_gated(&config(BatchStrategy::Size));
    for (verdict, text) in [(Verdict::Fail, "pulled the plug"), (Verdict::Poison, "not a finite number")] {
        let torn = encoder.submit(&request((0..6).map(|i| ids(5, i)).collect())).unwrap();
        gate.begun();
        let other = encoder.submit(&request((0..4).map(|i| ids(6, i)).collect())).unwrap();
        gate.let_it(verdict);
        let error = torn.await.unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
        assert_eq!(gate.run(), [6, 6, 6, 6]);
        other.await.unwrap();
    }
    assert_eq!(value(&registry, "trustformers_requests_total", Some("failed")), 2.0);
    assert_eq!(value(&registry, "trustformers_failed_steps_total", None), 1.0);
    assert_eq!(encoder.heartbeat().failed_steps, 0, "good steps followed");
    for failed in 1..=2 {
        let torn = encoder.submit(&request((0..4).map(|i| ids(5, i)).collect())).unwrap();
        gate.begun();
        gate.let_it(Verdict::Fail);
        torn.await.unwrap_err();
        assert_eq!(encoder.heartbeat().failed_steps, failed);
    }
    let last = encoder.submit(&request((0..4).map(|i| ids(5, i)).collect())).unwrap();
    gate.begun();
    gate.let_it(Verdict::Panic);
    assert_eq!(last.await.unwrap_err(), EncodeError::Stopped);
    // The thread ends after its requests were told.
    encoder.stop().await;
    assert!(!encoder.heartbeat().alive);
    assert_eq!(encoder.submit(&one(4, 9)).unwrap_err(), EncodeError::Stopped);
}

#[tokio::test]
async fn what_cannot_be_encoded_is_refused_by_name() {
    let (encoder, _registry) = start_on(Box::new(Oracle::new()), &config(BatchStrategy::Dynamic));
    let error = |params: EncodeParams| encoder.submit(&params).unwrap_err().to_string();
    assert!(error(request(Vec::new())).starts_with("input: 0 texts"));
    assert!(error(EncodeParams::texts(vec!["a"; 2049])).contains("2048"));
    assert!(error(request(vec![Prompt::Tokens(vec![1, 70_000])])).contains("70000"));
    assert!(error(request(vec![Prompt::Tokens(Vec::new())])).contains("empty"));
    assert!(error(of(&"a".repeat(257), [3])).starts_with("tenant: 257 bytes"));
    let strict = EncodeParams { truncate: false, ..request(vec![ids(3, 1), ids(65, 1)]) };
    assert!(error(strict.clone()).starts_with("text 1 has more than the 64 tokens"));
    let cut = encoder.submit(&EncodeParams { truncate: true, ..strict }).unwrap().await.unwrap();
    assert_eq!((cut.tokens, cut.truncated), (67, vec![1]));
    assert_eq!(encoder.in_flight(), 0);
}

#[tokio::test]
async fn stopping_ends_what_waits_and_draining_answers_it() {
    let (encoder, gate, _registry) = start_gated(&config(BatchStrategy::Size));
    let waiting = encoder.submit(&one(4, 1)).unwrap();
    encoder.stop().await;
    assert_eq!(waiting.await.unwrap_err(), EncodeError::Stopped);
    drop(gate);

    // A window of a second is not waited for once all handles are gone: nobody else can come.
    let (encoder, gate, _registry) = start_gated(&config(BatchStrategy::Size));
    let waiting = encoder.submit(&one(4, 1)).unwrap();
    drop(encoder);
    assert_eq!(gate.run(), [4]);
    waiting.await.unwrap();
}

#[test]
fn a_model_that_continues_texts_is_no_encoder() {
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

    /// Lists of any lengths, cut into requests in any way, give each text the bits that it has alone.
    #[test]
    fn alone_or_in_company_a_text_has_the_same_bits(
        lengths in prop::collection::vec(1usize..=64, 1..24),
        cut in 1usize..8,
        max_batch_size in 1usize..=8,
    ) {
        let backend = || Box::new(CpuBackend::new(CpuConfig { tier: None, threads: Some(2) }).unwrap());
        let alone = config(BatchStrategy::Dynamic);
        let (alone, _) = start_on(backend(), &EncoderConfig { max_batch_size: 1, ..alone });
        let crowd = config(BatchStrategy::Size);
        let crowd = EncoderConfig { max_batch_size, max_wait_ms: 1, token_budget: Some(150), ..crowd };
        let (crowd, _) = start_on(backend(), &crowd);
        let texts: Vec<_> = lengths.iter().enumerate().map(|(salt, len)| ids(*len, salt)).collect();
        let together: Vec<_> =
            texts.chunks(cut).map(|texts| crowd.submit(&request(texts.to_vec())).unwrap()).collect();
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
    let (encoder, gate, _registry) = start_gated(&config(BatchStrategy::Dynamic));
    let mut encoding = encoder.submit(&one(4, 1)).unwrap();
    gate.begun();
    assert!((&mut encoding).now_or_never().is_none());
    gate.let_it(Verdict::Run);
    encoding.await.unwrap();
}

//! The versions of a model over real engines: swaps under load, candidates that are bad, operations that are
//! sent twice.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use tempfile::TempDir;
use tokio::sync::watch;
use trustformers_api::{ApiError, Event, Generation, Health, Inference, Options, Priority};
use trustformers_model::seeded::{SeededEncoder, SeededModel};
use trustformers_plan::oracle::Oracle;
use trustformers_plan::{Backend, BackendError, Caps, EstimateSpec, LoadSpec, Loaded, MemoryReport};
use trustformers_proto::Task;
use trustformers_store::Source;

use super::*;
use crate::models::ModelServer;
use crate::probe::{GoldenProbe, tokens_sha256};

/// The oracle on a device with a limit that a test may change, which counts how often it is opened.
#[derive(Clone)]
struct LimitedDevice {
    limit_bytes: Arc<AtomicU64>,
    opened: Arc<AtomicU64>,
}

struct CappedOracle {
    oracle: Oracle,
    caps: Caps,
}

impl Backend for CappedOracle {
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

struct Fixture {
    server: Arc<ModelServer>,
    loader: Arc<Loader>,
    device: LimitedDevice,
    folder: TempDir,
}

impl Fixture {
    /// A server of the model `m`, revision `r1`, ready.
    async fn ready() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let unlimited = Oracle::new().caps().memory_bytes;
        let device =
            LimitedDevice { limit_bytes: Arc::new(AtomicU64::new(unlimited)), opened: Arc::default() };
        let open = device.clone();
        let open = move |_: &ModelSpec| {
            open.opened.fetch_add(1, Ordering::SeqCst);
            let oracle = Oracle::new();
            let memory_bytes = open.limit_bytes.load(Ordering::SeqCst);
            let caps = Caps { memory_bytes, ..oracle.caps().clone() };
            Ok(Box::new(CappedOracle { oracle, caps }) as Box<dyn Backend>)
        };
        let loader = Arc::new(Loader::new(Box::new(open), &prometheus::Registry::new()).unwrap());
        let first = seeded(folder.path(), "r1", 1);
        let server = Arc::new(ModelServer::new(vec![first]).unwrap());
        server.start_loading(&loader);
        server.readiness().wait_for(|verdict| verdict.ok).await.unwrap();
        Self { server, loader, device, folder }
    }

    fn seeded(&self, revision: &str, seed: u64) -> ModelSpec {
        seeded(self.folder.path(), revision, seed)
    }

    /// A version of `m` with these bytes.
    fn bytes(&self, revision: &str, bytes: &[u8]) -> ModelSpec {
        let file = self.folder.path().join(format!("{revision}.gguf"));
        std::fs::write(&file, bytes).unwrap();
        version(revision, Source::from_path(file))
    }

    fn model(&self) -> ModelStatus {
        self.server.statuses().watch().borrow()[0].clone()
    }

    /// Revision and role of each slot.
    fn slots(&self) -> Vec<(String, SlotRole)> {
        self.model().slots.iter().map(|slot| (slot.revision.clone(), slot.role())).collect()
    }

    /// The model's version in the second slot.
    fn second(&self) -> Arc<ManagedModel> {
        let models = self.server.table.snapshot();
        Arc::clone(&models.models()[0].second.as_ref().unwrap().version)
    }

    fn swap_to(&self, revision: &str) -> Result<ModelStatus, ControlError> {
        let revision = Some(revision.to_owned());
        self.server.swap("m", &SwapTarget::Version(VersionFilter { digest: None, revision }), None)
    }

    /// Digest and tokens of a greedy answer of a revision, or of whichever answers.
    async fn answer(&self, model: &str, revision: Option<&str>) -> Result<(String, Vec<u32>), ApiError> {
        answer(&self.server, model, revision).await
    }
}

fn version(revision: &str, source: Source) -> ModelSpec {
    let mut spec = ModelSpec::new("m", source);
    spec.revision = revision.to_owned();
    spec.engine.max_batch_size = 8;
    // The least that there is: otherwise less memory of the device would mean less for grammars.
    spec.engine.grammar_memory_bytes = 16 << 20;
    spec
}

fn seeded(folder: &std::path::Path, revision: &str, seed: u64) -> ModelSpec {
    let file = folder.join(format!("seed-{seed}.gguf"));
    // A file that is loaded must not change.
    if !file.exists() {
        std::fs::write(&file, SeededModel { seed, ..SeededModel::default() }.gguf()).unwrap();
    }
    version(revision, Source::from_path(file))
}

fn greedy(model: &str, revision: Option<&str>) -> Generation {
    Generation {
        prompt: "Hello".into(),
        model: Some(model.to_owned()),
        revision: revision.map(str::to_owned),
        max_tokens: 24,
        temperature: 0.0,
        top_p: 1.0,
        seed: None,
        priority: Priority::Normal,
        tenant: String::new(),
        options: Options::default(),
        left_out: trustformers_api::LeftOut::default(),
    }
}

async fn answer(
    server: &ModelServer,
    model: &str,
    revision: Option<&str>,
) -> Result<(String, Vec<u32>), ApiError> {
    let mut answer = server.generate(greedy(model, revision)).await?;
    let mut ids = Vec::new();
    while let Some(event) = answer.events.next().await {
        if let Event::Token { id, .. } = event? {
            ids.push(id);
        }
    }
    Ok((answer.model_digest, ids))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn swaps_under_streams_lose_no_answer_and_mix_none() {
    const STREAMS: usize = 8;
    const SWAPS: usize = 20;
    let fixture = Fixture::ready().await;
    fixture.server.load(fixture.seeded("r2", 2)).await.unwrap();
    let mut expected = HashMap::new();
    for revision in ["r1", "r2"] {
        let (digest, ids) = fixture.answer("m", Some(revision)).await.unwrap();
        expected.insert(digest, ids);
    }
    assert_eq!(expected.len(), 2);
    let expected = Arc::new(expected);
    let (answered, mut answers) = watch::channel(HashMap::<String, usize>::new());
    let (answered, (stop, stopped)) = (Arc::new(answered), watch::channel(false));
    let streams = (0..STREAMS).map(|_| {
        let (server, expected) = (Arc::clone(&fixture.server), Arc::clone(&expected));
        let (answered, stopped) = (Arc::clone(&answered), stopped.clone());
        tokio::spawn(async move {
            while !*stopped.borrow() {
                let (digest, ids) = answer(&server, "m", None).await.unwrap();
                assert_eq!(ids, expected[&digest], "an answer belongs to the digest that it names");
                answered.send_modify(|count| *count.entry(digest).or_default() += 1);
            }
        })
    });
    let streams: Vec<_> = streams.collect();
    for swap in 1..=SWAPS {
        let to = if swap % 2 == 1 { "r2" } else { "r1" };
        let digest = fixture.swap_to(to).unwrap().digest;
        // The version that was swapped in answers before the next swap.
        let before = answers.borrow().get(&digest).copied().unwrap_or_default();
        let answers_more = |count: &HashMap<String, usize>| count.get(&digest).is_some_and(|n| *n > before);
        answers.wait_for(answers_more).await.unwrap();
    }
    stop.send(true).unwrap();
    for stream in streams {
        stream.await.unwrap();
    }
    assert_eq!(fixture.server.inflight().count(), 0);
    assert_eq!(fixture.slots(), [("r1".into(), SlotRole::Current), ("r2".into(), SlotRole::Previous)]);
}

#[tokio::test]
async fn loads_and_unloads_give_all_memory_back() {
    let fixture = Fixture::ready().await;
    let reserved = fixture.loader.reserved_bytes();
    assert!(reserved > 0 && fixture.model().slots[0].memory_bytes > 0);
    for (revision, seed) in [("r2", 2), ("r3", 3), ("r4", 1)] {
        let loaded = fixture.server.load(fixture.seeded(revision, seed)).await.unwrap();
        assert_eq!((loaded.slots.len(), loaded.slots[1].role()), (2, SlotRole::Candidate));
        let before = loaded.digest.clone();
        assert!(fixture.loader.reserved_bytes() > reserved);
        fixture.swap_to(revision).unwrap();
        let old = VersionFilter { digest: Some(before), revision: None };
        let unloaded = fixture.server.unload_version("m", &old).await.unwrap();
        assert_eq!(unloaded.state(), ModelState::Unloaded);
        assert_eq!(fixture.loader.reserved_bytes(), reserved, "what the old version took is free");
        let again = fixture.server.unload_version("m", &old).await.unwrap();
        assert_eq!(again.state(), ModelState::Unloaded, "a second time changes nothing");
        assert_eq!(fixture.slots(), [(revision.to_owned(), SlotRole::Current)]);
    }
    let current = VersionFilter { digest: None, revision: Some("r4".into()) };
    fixture.server.load(fixture.seeded("r5", 5)).await.unwrap();
    let refused = fixture.server.unload_version("m", &current).await.unwrap_err();
    assert!(matches!(refused, ControlError::Refused { refusal: Refusal::Answers, .. }), "{refused}");
    fixture.server.unload("m").await.unwrap();
    assert_eq!(fixture.loader.reserved_bytes(), 0, "a model ends with both of its versions");
}

/// A probe with the prompt of [`greedy`].
fn probe(text: Option<&str>, tokens_sha256: Option<String>) -> GoldenProbe {
    let text = text.map(str::to_owned);
    GoldenProbe { prompt: "Hello".into(), max_tokens: 24, text, begins_with: None, tokens_sha256 }
}

/// The weights of a seeded model with another tokenizer: the tokens `d` and `e` have changed places.
fn with_another_tokenizer(seed: u64) -> Vec<u8> {
    let mut file = SeededModel { seed, ..SeededModel::default() }.gguf();
    // As GGUF writes them, one behind the other, each behind its length.
    let length = 1_u64.to_le_bytes();
    let tokens = [&length[..], b"d", &length[..], b"e"].concat();
    let at = file.windows(tokens.len()).position(|bytes| bytes == tokens).unwrap();
    file.swap(at + length.len(), at + tokens.len() - 1);
    file
}

#[tokio::test]
async fn a_bad_candidate_says_why_and_never_touches_what_serves() {
    let fixture = Fixture::ready().await;
    let good = SeededModel { seed: 2, ..SeededModel::default() }.gguf();
    let before = fixture.answer("m", None).await.unwrap();
    let reserved = fixture.loader.reserved_bytes();
    let with = |change: &dyn Fn(&mut ModelSpec)| {
        let mut spec = fixture.bytes("bad", &good);
        change(&mut spec);
        spec
    };
    let mut broken = good.clone();
    let length = broken.len();
    // The last tensor's values are no numbers, whichever type they have.
    broken[length - 1024..].fill(0xff);
    SeededEncoder::default().write(fixture.folder.path()).unwrap();
    let answered = || vec![probe(None, Some(tokens_sha256(&before.1)))];
    let renamed = fixture.bytes("other-tokenizer", &with_another_tokenizer(1));
    let cases = [
        (fixture.bytes("truncated", &good[..length / 2]), "MalformedModel", "truncated.gguf"),
        (with(&|spec| spec.sha256 = Some("0".repeat(64))), "DigestMismatch", "0000"),
        (fixture.bytes("nan", &broken), "NotFinite", "not a finite number"),
        (with(&|spec| spec.engine.context_tokens = Some(1 << 30)), "", "context"),
        (version("other", Source::from_path(fixture.folder.path().join("model.safetensors"))), "", ""),
        (with(&|spec| spec.task = Some(Task::Embed)), "TaskMismatch", "the task embed"),
        (
            with(&|spec| spec.probes = vec![probe(Some("no such answer"), None)]),
            "WrongAnswer",
            "no such answer",
        ),
        (with(&|spec| spec.probes = answered()), "WrongAnswer", "sha256"),
        // The weights are those that serve.
        (ModelSpec { probes: answered(), ..renamed }, "WrongAnswer", "sha256"),
        (
            with(&|spec| spec.probes = vec![GoldenProbe::of_beginning("Hello", "no such answer").unwrap()]),
            "WrongAnswer",
            "does not begin with",
        ),
    ];
    for (spec, reason, says) in cases {
        let revision = spec.revision.clone();
        let error = fixture.server.load(spec).await.unwrap_err();
        let ControlError::NotLoaded { failure, .. } = &error else { panic!("{revision}: {error}") };
        assert!(reason.is_empty() || failure.reason == reason, "{revision}: {failure:?}");
        assert!(failure.message.contains(says), "{revision}: {failure}");
        let slots = fixture.model().slots;
        assert_eq!(slots[1].state(), ModelState::Failed);
        assert_eq!((slots[1].reason.as_str(), &slots[1].message), (failure.reason, &failure.message));
        assert_eq!(slots[0].state(), ModelState::Ready);
        assert_eq!(fixture.answer("m", None).await.unwrap(), before);
        assert_eq!(fixture.loader.reserved_bytes(), reserved, "{revision}");
        assert!(fixture.server.readiness().borrow().ok && fixture.server.liveness().ok);
        let refused = fixture.swap_to(&revision).unwrap_err().to_string();
        assert!(refused.contains("failed and cannot answer"), "{refused}");
    }
    fixture.device.limit_bytes.store(64 << 20, Ordering::SeqCst);
    let error = fixture.server.load(fixture.seeded("large", 2)).await.unwrap_err().to_string();
    assert!(error.contains("(InsufficientMemory)") && error.contains("unload another model"), "{error}");
    assert_eq!(fixture.answer("m", None).await.unwrap(), before);
    assert!(fixture.server.readiness().borrow().ok && fixture.server.liveness().ok);
}

#[tokio::test]
async fn a_golden_probe_that_is_answered_lets_the_version_serve() {
    let fixture = Fixture::ready().await;
    let (_, ids) = fixture.answer("m", None).await.unwrap();
    let (mut answer, mut text) = (fixture.server.generate(greedy("m", None)).await.unwrap(), String::new());
    while let Some(event) = answer.events.next().await {
        if let Event::Token { text: piece, .. } = event.unwrap() {
            text.push_str(&piece);
        }
    }
    // The end of the first character: the answer of random weights may be any text.
    let first = text.chars().next().map(char::len_utf8).unwrap();
    let mut spec = fixture.seeded("r2", 1);
    let whole = probe(None, Some(tokens_sha256(&ids)));
    spec.probes = vec![whole, GoldenProbe::of_beginning("Hello", &text[..first]).unwrap()];
    let loaded = fixture.server.load(spec).await.unwrap();
    assert_eq!(loaded.slots[1].state(), ModelState::Ready);
}

#[tokio::test]
async fn operations_that_break_off_go_on_and_those_that_are_sent_again_change_nothing() {
    let fixture = Fixture::ready().await;
    let load = |revision: &'static str, seed| {
        let (server, spec) = (Arc::clone(&fixture.server), fixture.seeded(revision, seed));
        async move { server.load(spec).await }
    };
    let opened = fixture.device.opened.load(Ordering::SeqCst);
    {
        let mut call = Box::pin(load("r2", 2));
        // It has begun, and its caller leaves.
        assert!(futures::poll!(call.as_mut()).is_pending());
    }
    let (again, and_again) = tokio::join!(load("r2", 2), load("r2", 2));
    assert_eq!(again, and_again);
    assert_eq!(again.unwrap().slots[1].state(), ModelState::Ready);
    assert_eq!(fixture.device.opened.load(Ordering::SeqCst), opened + 1, "one load, whoever waits for it");
    let other = load("r2", 3).await.unwrap_err();
    assert!(matches!(other, ControlError::Refused { refusal: Refusal::RevisionTaken { .. }, .. }), "{other}");
    let busy = load("r3", 3).await.unwrap_err().to_string();
    assert!(busy.contains("both slots are in use") && busy.contains("\"r2\" is ready"), "{busy}");

    let (first, second) = (fixture.model().slots[0].digest.clone(), fixture.model().slots[1].digest.clone());
    let swap = |digest: &str, expected: &str| {
        let wanted = VersionFilter { digest: Some(digest.to_owned()), revision: None };
        fixture.server.swap("m", &SwapTarget::Version(wanted), Some(expected))
    };
    for _ in 0..2 {
        assert_eq!(swap(&second, &first).unwrap().digest, second);
    }
    let late = swap(&first, &first).unwrap_err();
    assert!(matches!(late, ControlError::Refused { refusal: Refusal::Changed { .. }, .. }), "{late}");
    for _ in 0..2 {
        assert_eq!(fixture.server.rollback("m", Some(&second)).unwrap().digest, first);
    }
    let again = fixture.server.rollback("m", None).unwrap_err();
    assert!(matches!(again, ControlError::Refused { refusal: Refusal::NothingBefore, .. }), "{again}");
    assert_eq!(fixture.slots(), [("r1".into(), SlotRole::Current), ("r2".into(), SlotRole::RolledBack)]);
    load("r3", 3).await.unwrap();
    assert_eq!(fixture.slots()[1], ("r3".into(), SlotRole::Candidate), "what was rolled back made room");
}

#[tokio::test]
async fn two_revisions_answer_side_by_side_and_a_request_chooses() {
    let fixture = Fixture::ready().await;
    fixture.server.load(fixture.seeded("r2", 2)).await.unwrap();
    let (plain, first) = (fixture.answer("m", None).await, fixture.answer("m", Some("r1")).await);
    assert_eq!(plain, first);
    let second = fixture.answer("m", Some("r2")).await.unwrap();
    assert_ne!(first.unwrap().0, second.0);
    let error = fixture.answer("m", Some("r9")).await.unwrap_err();
    assert!(matches!(&error, ApiError::UnknownRevision { loaded, .. } if loaded == "r1, r2"), "{error}");
    let digests: Vec<String> = fixture.model().slots.iter().map(|slot| slot.digest.clone()).collect();
    assert_eq!(digests[1], second.0);
}

#[tokio::test]
async fn a_third_load_waits_until_the_version_before_has_answered() {
    let fixture = Fixture::ready().await;
    fixture.server.load(fixture.seeded("r2", 2)).await.unwrap();
    fixture.swap_to("r2").unwrap();
    let before = fixture.second();
    let request = before.inflight().register();
    let loading = {
        let (server, spec) = (Arc::clone(&fixture.server), fixture.seeded("r3", 3));
        tokio::spawn(async move { server.load(spec).await })
    };
    before.until_retired().await;
    let slot = fixture.model().slots[1].clone();
    assert_eq!((slot.revision.as_str(), slot.state()), ("r3", ModelState::Pending));
    assert!(before.serving().is_some(), "a request is in flight");
    let mut watch = fixture.server.statuses().watch();
    watch.wait_for(|models| models[0].slots[1].message.contains("has answered what it began")).await.unwrap();
    drop(request);
    let loaded = loading.await.unwrap().unwrap();
    assert_eq!((loaded.slots[1].revision.as_str(), loaded.slots[1].state()), ("r3", ModelState::Ready));
    assert!(before.serving().is_none());
}

#[tokio::test]
async fn a_version_that_is_only_kept_gives_its_memory_to_another_load() {
    let fixture = Fixture::ready().await;
    let one = fixture.loader.reserved_bytes();
    fixture.server.load(fixture.seeded("r2", 2)).await.unwrap();
    fixture.swap_to("r2").unwrap();
    // Room for two models and a half, beside what the process itself takes.
    fixture.device.limit_bytes.store((48 << 20) + one * 5 / 2, Ordering::SeqCst);
    let mut other = fixture.seeded("", 3);
    other.names = vec!["other".into()];
    other.engine.model_label = "other".into();
    fixture.server.load(other).await.unwrap();
    assert_eq!(fixture.slots(), [("r2".into(), SlotRole::Current)]);
    let nothing = fixture.server.rollback("m", None).unwrap_err().to_string();
    assert!(nothing.contains("no version before the current one is loaded"), "{nothing}");
}

#[tokio::test]
async fn a_model_that_was_loaded_under_its_own_name_takes_over() {
    let fixture = Fixture::ready().await;
    let own_name = |name: &str, seed| {
        let mut spec = fixture.seeded("", seed);
        spec.names = vec![name.to_owned()];
        spec.engine.model_label = name.to_owned();
        spec
    };
    fixture.server.load(own_name("v2", 2)).await.unwrap();
    let (v1, v2) = (fixture.answer("m", None).await.unwrap(), fixture.answer("v2", None).await.unwrap());
    let swap = || fixture.server.swap("m", &SwapTarget::OtherModel("v2".into()), None);
    for _ in 0..2 {
        assert_eq!(swap().unwrap().digest, v2.0);
    }
    assert_eq!(fixture.server.statuses().watch().borrow().len(), 1, "it is a version now");
    for name in ["m", "v2"] {
        assert_eq!(fixture.answer(name, None).await.unwrap(), v2, "{name}");
    }
    assert_eq!(fixture.server.rollback("m", None).unwrap().digest, v1.0);
    assert_eq!(fixture.answer("m", None).await.unwrap(), v1);
    assert_eq!(fixture.answer("v2", None).await.unwrap(), v2, "its own name still names it");
    assert_eq!(swap().unwrap().digest, v2.0);
    fixture.server.rollback("m", None).unwrap();
    fixture.server.unload("v2").await.unwrap();
    assert!(matches!(fixture.answer("v2", None).await, Err(ApiError::UnknownModel { .. })));
    assert_eq!(fixture.answer("m", None).await.unwrap(), v1);
    let unknown = swap().unwrap_err();
    assert_eq!(unknown, ControlError::Unknown { name: "v2".into() });
}

#[tokio::test]
async fn an_unload_while_a_version_waits_or_loads_ends_it() {
    let fixture = Fixture::ready().await;
    let _other_loads = fixture.loader.permit().await;
    let loading = {
        let (server, spec) = (Arc::clone(&fixture.server), fixture.seeded("r2", 2));
        tokio::spawn(async move { server.load(spec).await })
    };
    let mut watch = fixture.server.statuses().watch();
    watch.wait_for(|models| models[0].slots.len() == 2).await.unwrap();
    let second = VersionFilter { digest: None, revision: Some("r2".into()) };
    let unloading = fixture.server.unload_version("m", &second);
    let unloaded = tokio::time::timeout(Duration::from_secs(60), unloading).await.unwrap().unwrap();
    assert_eq!(unloaded.state(), ModelState::Unloaded);
    assert!(matches!(loading.await.unwrap(), Err(ControlError::Unloaded { .. })));
    assert_eq!(fixture.slots(), [("r1".into(), SlotRole::Current)]);
}

//! Applies a configuration that changed while the server runs.
//!
//! The file, or the folder of models, is read once in [`PERIOD`] instead of being watched: this also works on
//! network volumes, for a ConfigMap that kubelet replaces by a link, and for editors that write another file
//! and rename it. A change counts once two readings in a row are equal, so that a file that is being written
//! is not applied by half.
//!
//! Models that are gone are unloaded first, which frees their memory; new ones load in the background; one
//! that changed is loaded beside the old one, which serves until then and stays where the new one cannot be
//! loaded. A configuration that cannot be used changes nothing. The log says what was done and what was not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use trustformers_proto::v1::ModelState;
use trustformers_runtime::models::ModelServer;

use crate::config::{Config, ModelConfig};
use crate::config_source::{ConfigSource, SourceContent};
use crate::remote::RemoteConfig;

/// Time between two readings.
const PERIOD: Duration = Duration::from_secs(1);

/// A source and what was read from it.
#[derive(Debug, Clone)]
pub(crate) struct Followed {
    pub(crate) source: ConfigSource,
    pub(crate) reading: SourceContent,
}

/// Follows a configuration.
pub(crate) struct Reloader {
    source: ConfigSource,
    threads: Option<usize>,
    models: Arc<ModelServer>,
    settled: Settled,
    /// The configuration that was applied last, with the models as they are served.
    applied: Config,
    /// Takes the models that other servers have; none where the server is no gateway.
    remote: Option<watch::Sender<RemoteConfig>>,
}

/// The reading that is in force, and the one that may follow.
struct Settled {
    current: Observation,
    next: Option<Observation>,
}

/// A reading, or why there is none.
type Observation = Result<SourceContent, String>;

impl Settled {
    /// The reading, where it differs from the one in force and is the same as the last one.
    fn observe(&mut self, seen: Observation) -> Option<&Observation> {
        if seen == self.current {
            self.next = None;
            return None;
        }
        if self.next.as_ref() != Some(&seen) {
            self.next = Some(seen);
            return None;
        }
        self.next = None;
        self.current = seen;
        Some(&self.current)
    }
}

/// What a change means for one model of the old or the new configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Remove(String),
    Add(ModelConfig),
    Replace(ModelConfig),
}

/// The steps from what is served to what is configured, removals first. `states` are those of the models that
/// are loaded.
fn steps(old: &Config, new: &Config, states: &BTreeMap<String, ModelState>) -> Vec<Step> {
    let named = |config: &Config| -> BTreeMap<String, ModelConfig> {
        let local = config.models.iter().filter(|model| !model.is_remote());
        local.map(|model| (model.name.clone(), model.clone())).collect()
    };
    let (before, after) = (named(old), named(new));
    let is_there = |name: &String| states.contains_key(name);
    let mut steps: Vec<Step> = (before.keys())
        .filter(|name| !after.contains_key(*name) && is_there(name))
        .map(|name| Step::Remove(name.clone()))
        .collect();
    let mut then = Vec::new();
    for (name, model) in &after {
        match (before.get(name), states.get(name)) {
            // It serves or will serve as it is configured.
            (Some(present), Some(state)) if present == model && *state != ModelState::Failed => {}
            // It was unloaded over the API, and the configuration says nothing new about it.
            (Some(present), None) if present == model => {}
            (Some(_), Some(ModelState::Ready)) => then.push(Step::Replace(model.clone())),
            // What does not serve has nothing to lose.
            (Some(_), Some(_)) => {
                steps.push(Step::Remove(name.clone()));
                then.push(Step::Add(model.clone()));
            }
            // A name that was loaded over the API is taken; the attempt says so.
            (None, _) | (_, None) => then.push(Step::Add(model.clone())),
        }
    }
    // Those that load in the background do not wait for those that are replaced one by one.
    then.sort_by_key(|step| matches!(step, Step::Replace(_)));
    steps.extend(then);
    steps
}

impl Reloader {
    /// Follows a source whose configuration, as it was read, is served already.
    pub(crate) fn new(
        followed: Followed,
        applied: &Config,
        threads: Option<usize>,
        models: Arc<ModelServer>,
    ) -> Self {
        let Followed { source, reading } = followed;
        let settled = Settled { current: Ok(reading), next: None };
        Self { source, threads, models, settled, applied: applied.effective(), remote: None }
    }

    /// Sets what takes the models that other servers have.
    pub(crate) fn with_remote(mut self, remote: Option<watch::Sender<RemoteConfig>>) -> Self {
        self.remote = remote;
        self
    }

    /// Reads and applies for ever.
    pub(crate) async fn run(mut self) {
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.look().await;
        }
    }

    /// One reading.
    async fn look(&mut self) {
        let source = self.source.clone();
        let read = move || source.read().map_err(|error| error.to_string());
        let seen = tokio::task::spawn_blocking(read).await.unwrap_or_else(|error| Err(error.to_string()));
        let Some(changed) = self.settled.observe(seen) else { return };
        let config = match changed {
            Ok(reading) => self.source.config_of(reading).map_err(|error| error.to_string()),
            Err(why) => Err(why.clone()),
        };
        match config {
            Ok(config) => self.apply(&config).await,
            Err(why) => {
                let file = self.source.path().display();
                tracing::error!(%file, "the changed configuration is not used, and everything stays as it is: {why}");
            }
        }
    }

    async fn apply(&mut self, config: &Config) {
        let new = config.effective();
        let applied = &self.applied;
        let monitoring = |config: &Config| (config.prometheus_port, config.tracing.clone());
        if new.server != applied.server || monitoring(&new) != monitoring(applied) {
            tracing::warn!("changes of server and monitoring take effect when the server is started again");
        }
        self.apply_remote(&new);
        let names = self.applied.models.iter().chain(&new.models).map(|model| model.name.clone());
        let states = names.filter_map(|name| Some((name.clone(), self.models.state_of(&name)?))).collect();
        let mut steps = steps(&self.applied, &new, &states);
        if self.remote.is_none() {
            // Nothing is forwarded, so what is loaded here answers until the next start.
            let is_remote =
                |name: &String| new.models.iter().any(|model| model.name == *name && model.is_remote());
            steps.retain(|step| !matches!(step, Step::Remove(name) if is_remote(name)));
        }
        tracing::info!(steps = steps.len(), "the configuration changed");
        let removed = |name: &String| steps.contains(&Step::Remove(name.clone()));
        let gone = self.applied.models.iter().filter(|model| removed(&model.name));
        let models = &self.models;
        let unloads = gone.map(|model| async move {
            if let Err(error) = models.unload(&model.name).await {
                tracing::warn!(model = %model.name, "{error}");
            }
        });
        join_all(unloads).await;
        let is_configured = |name: &String| new.models.iter().any(|model| model.name == *name);
        self.applied.models.retain(|model| is_configured(&model.name) && !removed(&model.name));
        for step in steps {
            self.take(step, &new).await;
        }
        self.applied.batching = new.batching;
        tracing::info!(models = self.applied.models.len(), "the changed configuration is applied");
    }

    /// Whether a server is a gateway is decided when it starts.
    fn apply_remote(&self, new: &Config) {
        let remote = RemoteConfig::of(new);
        match &self.remote {
            Some(sender) => {
                sender.send_if_modified(|present| {
                    let changes = *present != remote;
                    *present = remote;
                    changes
                });
            }
            None if remote.models.is_empty() => {}
            None => {
                tracing::error!(
                    "the first model with endpoints takes effect when the server is started again; \
                     until then what is loaded here answers"
                );
            }
        }
    }

    async fn take(&mut self, step: Step, new: &Config) {
        let (model, replaces) = match step {
            Step::Add(model) => (model, false),
            Step::Replace(model) => (model, true),
            // Done already.
            Step::Remove(_) => return,
        };
        let place = new.models.iter().position(|one| one.name == model.name).unwrap_or_default();
        let outcome = match model.spec(&format!("models[{place}]"), &new.batching, self.threads) {
            Err(error) => Err(error.to_string()),
            Ok(spec) if replaces => self.models.replace(spec).await.map_err(|error| error.to_string()),
            Ok(spec) => self.models.add(spec).map_err(|error| error.to_string()),
        };
        let name = model.name.clone();
        match outcome {
            Ok(()) => {
                self.applied.models.retain(|one| one.name != name);
                self.applied.models.push(model);
                if replaces {
                    tracing::info!(model = %name, "the model was replaced by its changed configuration");
                }
            }
            Err(why) if replaces => tracing::error!(model = %name, "the model stays as it was: {why}"),
            Err(why) => tracing::error!(model = %name, "the model is not added: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::str::FromStr;
    use trustformers_model::seeded::SeededModel;
    use trustformers_proto::v1::ModelStatus;
    use trustformers_runtime::device;
    use trustformers_runtime::load::Loader;
    use trustformers_runtime::spec::ModelSpec;
    use trustformers_store::Source;

    fn config(models: &str) -> Config {
        Config::from_str(&format!("models: [{models}]")).unwrap().effective()
    }

    #[test]
    fn a_change_counts_once_two_readings_are_equal() {
        let text = |text: &str| Ok(SourceContent::File(text.to_owned()));
        let mut settled = Settled { current: text("a"), next: None };
        assert_eq!(settled.observe(text("a")), None);
        assert_eq!(settled.observe(text("")), None, "the file is being written");
        assert_eq!(settled.observe(text("b")), None);
        assert_eq!(settled.observe(text("b")), Some(&text("b")));
        assert_eq!(settled.observe(text("b")), None);
        let gone = || Err("gone".to_owned());
        assert_eq!(settled.observe(gone()), None);
        assert_eq!(settled.observe(text("b")), None, "it was only replaced");
        assert_eq!(settled.observe(gone()), None);
        assert_eq!(settled.observe(gone()), Some(&gone()));
        assert_eq!(settled.observe(gone()), None, "reported once");
    }

    #[test]
    fn each_model_is_left_alone_removed_added_or_replaced() {
        let old = config(
            "{name: same, path: /a}, {name: gone, path: /b}, {name: changed, path: /c}, \
             {name: failed, path: /d}, {name: loading, path: /e}, {name: unloaded, path: /f}",
        );
        let new = config(
            "{name: same, path: /a}, {name: changed, path: /c2}, {name: failed, path: /d}, \
             {name: loading, path: /e2}, {name: unloaded, path: /f}, {name: new, path: /g}",
        );
        let states = BTreeMap::from([
            ("same".to_owned(), ModelState::Ready),
            ("gone".to_owned(), ModelState::Ready),
            ("changed".to_owned(), ModelState::Ready),
            ("failed".to_owned(), ModelState::Failed),
            ("loading".to_owned(), ModelState::Loading),
        ]);
        let model = |name: &str| new.models.iter().find(|model| model.name == name).unwrap().clone();
        let remove = |name: &str| Step::Remove(name.to_owned());
        assert_eq!(
            steps(&old, &new, &states),
            [
                remove("gone"),
                remove("failed"),
                remove("loading"),
                Step::Add(model("failed")),
                Step::Add(model("loading")),
                Step::Add(model("new")),
                Step::Replace(model("changed")),
            ]
        );
        assert_eq!(steps(&old, &old, &BTreeMap::from([("same".to_owned(), ModelState::Warming)])), []);
        let changed = config("{name: unloaded, path: /f2}");
        assert_eq!(steps(&old, &changed, &BTreeMap::new()), [Step::Add(changed.models[0].clone())]);
    }

    #[test]
    fn a_changed_default_changes_the_models_that_take_it() {
        let old = config("{name: a, path: /a}, {name: b, path: /b, max_batch_size: 2}");
        let text = "batching: {max_batch_size: 4}\nmodels: [{name: a, path: /a}, {name: b, path: /b, max_batch_size: 2}]";
        let new = Config::from_str(text).unwrap().effective();
        let states = ["a", "b"].map(|name| (name.to_owned(), ModelState::Ready)).into_iter().collect();
        assert_eq!(steps(&old, &new, &states), [Step::Replace(new.models[0].clone())]);
    }

    /// A configuration on disk, and what serves and follows it.
    struct Fixture {
        folder: tempfile::TempDir,
        reloader: Reloader,
        models: Arc<ModelServer>,
    }

    impl Fixture {
        /// Serves `models`, in which `$` is a folder with the models `1.gguf` and `2.gguf` and a broken one.
        async fn start(models: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            for seed in [1, 2] {
                let model = SeededModel { seed, ..SeededModel::default() };
                std::fs::write(folder.path().join(format!("{seed}.gguf")), model.gguf()).unwrap();
            }
            std::fs::write(folder.path().join("broken.gguf"), b"no model").unwrap();
            let source = ConfigSource::file(folder.path().join("config.yaml"));
            write(folder.path(), models);
            let reading = source.read().unwrap();
            let config = source.config_of(&reading).unwrap();
            let models = Arc::new(ModelServer::new(config.specs(Some(1)).unwrap()).unwrap());
            let loader = Loader::new(device::real(), &prometheus::Registry::new()).unwrap();
            models.start_loading(&Arc::new(loader));
            let followed = Followed { source, reading };
            let reloader = Reloader::new(followed, &config, Some(1), Arc::clone(&models));
            let fixture = Self { folder, reloader, models };
            fixture.until_loaded().await;
            fixture
        }

        /// Writes the configuration and reads it as often as it takes to apply it.
        async fn change(&mut self, models: &str) {
            write(self.folder.path(), models);
            self.reloader.look().await;
            self.reloader.look().await;
            self.until_loaded().await;
        }

        async fn until_loaded(&self) {
            let is_over =
                |model: &ModelStatus| matches!(model.state(), ModelState::Ready | ModelState::Failed);
            let mut watch = self.models.statuses().watch();
            watch.wait_for(|models| models.iter().all(is_over)).await.unwrap();
        }

        /// Names and digests of the models that serve, by name.
        fn serving(&self) -> BTreeMap<String, String> {
            let models = self.models.statuses().watch().borrow().clone();
            let serving = models.iter().filter(|model| model.state() == ModelState::Ready);
            serving.map(|model| (model.name.clone(), model.digest.clone())).collect()
        }
    }

    fn write(folder: &Path, models: &str) {
        let models = models.replace('$', folder.to_str().unwrap());
        std::fs::write(folder.join("config.yaml"), format!("models: {models}\n")).unwrap();
    }

    #[tokio::test]
    async fn models_of_the_file_are_added_changed_and_removed() {
        let mut fixture = Fixture::start("[{name: a, path: $/1.gguf}, {name: b, path: $/1.gguf}]").await;
        let before = fixture.serving();
        assert_eq!(before["a"], before["b"]);
        fixture.change("[{name: a, path: $/2.gguf}, {name: c, path: $/2.gguf}]").await;
        let after = fixture.serving();
        assert_eq!(after.keys().collect::<Vec<_>>(), ["a", "c"]);
        assert!(after["a"] == after["c"] && after["a"] != before["a"]);
        fixture.change("[{name: c, path: $/2.gguf, context_tokens: 64}]").await;
        assert_eq!(fixture.serving().into_keys().collect::<Vec<_>>(), ["c"]);
        let models = fixture.models.statuses().watch().borrow().clone();
        assert_eq!(models[0].context_tokens, 64);
    }

    #[tokio::test]
    async fn a_broken_file_and_a_broken_model_leave_what_serves_as_it_is() {
        let mut fixture = Fixture::start("[{name: a, path: $/1.gguf}]").await;
        let before = fixture.serving();
        for broken in ["[", "[]", "[{nam: a}]", "[{name: a, path: $/broken.gguf}]"] {
            fixture.change(broken).await;
            assert_eq!(fixture.serving(), before, "{broken}");
        }
        std::fs::remove_file(fixture.folder.path().join("config.yaml")).unwrap();
        fixture.reloader.look().await;
        fixture.reloader.look().await;
        assert_eq!(fixture.serving(), before, "the file is gone");
        fixture.change("[{name: a, path: $/2.gguf}]").await;
        assert_ne!(fixture.serving(), before);
    }

    #[tokio::test]
    async fn a_model_that_gets_endpoints_stays_where_nothing_is_forwarded() {
        let mut fixture = Fixture::start("[{name: a, path: $/1.gguf}, {name: b, path: $/1.gguf}]").await;
        fixture.change("[{name: a, endpoints: [{url: 'http://127.0.0.1:9'}]}]").await;
        assert_eq!(fixture.serving().into_keys().collect::<Vec<_>>(), ["a"]);
        fixture.change("[{name: a, path: $/2.gguf}]").await;
        assert_eq!(fixture.serving().len(), 1);
    }

    #[tokio::test]
    async fn a_model_that_failed_is_tried_again_with_the_next_change() {
        let mut fixture = Fixture::start("[{name: a, path: $/1.gguf}, {name: b, path: $/broken.gguf}]").await;
        assert_eq!(fixture.serving().len(), 1);
        let good = SeededModel::default().gguf();
        std::fs::write(fixture.folder.path().join("broken.gguf"), good).unwrap();
        fixture.change("[{name: a, path: $/1.gguf}, {name: b, path: $/broken.gguf}] # mended").await;
        assert_eq!(fixture.serving().len(), 2);
    }

    #[tokio::test]
    async fn a_model_that_a_caller_loaded_stays_and_keeps_its_name() {
        let mut fixture = Fixture::start("[{name: a, path: $/1.gguf}]").await;
        let path = fixture.folder.path().join("2.gguf");
        let spec = ModelSpec::new("mine", Source::from_path(path));
        let mine = fixture.models.load(spec).await.unwrap();
        fixture.change("[{name: b, path: $/1.gguf}, {name: mine, path: $/1.gguf}]").await;
        let serving = fixture.serving();
        assert_eq!(serving.keys().collect::<Vec<_>>(), ["b", "mine"]);
        assert_eq!(serving["mine"], mine.digest);
        fixture.models.unload("mine").await.unwrap();
        fixture.change("[{name: b, path: $/1.gguf}, {name: mine, path: $/1.gguf}] # again").await;
        assert_eq!(fixture.serving()["mine"], fixture.serving()["b"]);
    }
}

//! `status`: a table of models, or one model with its conditions, its load, its rollout and its pods.

use std::collections::BTreeMap;
use std::process::ExitCode;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Resource, ResourceExt};
use trustformers_crds::InferenceModel;
use trustformers_crds::names::MODEL_LABEL;

use crate::args::StatusArgs;
use crate::cluster::{Cluster, CommandError, answered, refused_watch};
use crate::model::{ModelPage, ModelRow, models_table};
use crate::output::{self, Screen};

/// Runs the command.
///
/// # Errors
/// When a request fails.
pub async fn run(cluster: &Cluster, args: StatusArgs) -> Result<ExitCode, CommandError> {
    let StatusArgs { name, all_namespaces, watch, format } = args;
    match (name, watch) {
        (Some(name), true) => watch_model(cluster, &name).await?,
        (None, true) => watch_models(cluster, all_namespaces).await?,
        (Some(name), false) => {
            let model = cluster.model(&name).await?;
            let pods = answered("pods", cluster.api::<Pod>().list(&pods_of(&name))).await?;
            let page = ModelPage::of(&model, &pods.items, Timestamp::now());
            output::print(format.output, &page, ModelPage::text)?;
        }
        (None, false) => {
            let list = models(cluster, all_namespaces);
            let models = answered("InferenceModels", list.list(&ListParams::default())).await?;
            let now = Timestamp::now();
            let rows: Vec<_> = models.iter().map(|model| ModelRow::of(model, now)).collect();
            output::print(format.output, &rows, |rows| models_table(rows, all_namespaces))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Selects the pods of a model.
#[must_use]
pub fn pods_of(model: &str) -> ListParams {
    ListParams::default().labels(&format!("{MODEL_LABEL}={model}"))
}

fn models(cluster: &Cluster, all_namespaces: bool) -> Api<InferenceModel> {
    if all_namespaces { Api::all(cluster.client.clone()) } else { cluster.api() }
}

async fn watch_models(cluster: &Cluster, all_namespaces: bool) -> Result<(), CommandError> {
    let mut observed = Observed::default();
    let mut screen = Screen::default();
    let api = models(cluster, all_namespaces);
    let mut events = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff());
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => observed.take(event),
            Err(cause) => refused_watch("InferenceModels", cause)?,
        }
        if observed.is_complete {
            let now = Timestamp::now();
            let rows: Vec<_> = observed.objects.values().map(|model| ModelRow::of(model, now)).collect();
            screen.show(&models_table(&rows, all_namespaces))?;
        }
    }
    Ok(())
}

async fn watch_model(cluster: &Cluster, name: &str) -> Result<(), CommandError> {
    // A name that nobody has is an error at once, and not an empty screen.
    cluster.model(name).await?;
    let this = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let of_model = watcher::Config::default().labels(&format!("{MODEL_LABEL}={name}"));
    let mut models = std::pin::pin!(watcher(cluster.api::<InferenceModel>(), this).default_backoff());
    let mut all_pods = std::pin::pin!(watcher(cluster.api::<Pod>(), of_model).default_backoff());
    let (mut model, mut pods) = (Observed::default(), Observed::default());
    let mut screen = Screen::default();
    loop {
        tokio::select! {
            Some(event) = models.next() => match event {
                Ok(event) => model.take(event),
                Err(cause) => refused_watch("the model", cause)?,
            },
            Some(event) = all_pods.next() => match event {
                Ok(event) => pods.take(event),
                Err(cause) => refused_watch("its pods", cause)?,
            },
            else => return Ok(()),
        }
        if !(model.is_complete && pods.is_complete) {
            continue;
        }
        let Some(model) = model.objects.values().next() else {
            return Err(CommandError::Nothing(format!("InferenceModel {name} was deleted")));
        };
        screen.show(&ModelPage::of(model, pods.objects.values(), Timestamp::now()).text())?;
    }
}

/// The objects of a watch, by namespace and name.
struct Observed<K> {
    objects: BTreeMap<String, K>,
    /// Whether the first list has arrived: before, an empty set says nothing.
    is_complete: bool,
}

impl<K> Default for Observed<K> {
    fn default() -> Self {
        Self { objects: BTreeMap::new(), is_complete: false }
    }
}

impl<K: Resource> Observed<K> {
    fn take(&mut self, event: watcher::Event<K>) {
        let key = |object: &K| format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any());
        match event {
            watcher::Event::Init => {
                self.objects.clear();
                self.is_complete = false;
            }
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                self.objects.insert(key(&object), object);
            }
            watcher::Event::Delete(object) => {
                self.objects.remove(&key(&object));
            }
            watcher::Event::InitDone => self.is_complete = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::shifting;

    #[test]
    fn objects_of_a_watch_are_complete_after_its_first_list() {
        let mut observed = Observed::default();
        observed.take(watcher::Event::Init);
        observed.take(watcher::Event::InitApply(shifting()));
        assert!(!observed.is_complete);
        observed.take(watcher::Event::InitDone);
        assert!(observed.is_complete && observed.objects.contains_key("team/chat"));
        observed.take(watcher::Event::Delete(shifting()));
        assert!(observed.is_complete && observed.objects.is_empty());
        // A watch that begins anew lists everything again.
        observed.take(watcher::Event::Init);
        assert!(!observed.is_complete);
    }
}

//! The watches that fill the caches, and which models each change wakes.
//!
//! A change wakes a model only if something differs that is read: the echo of the operator's own write, or a
//! status of a child that says nothing new, wakes none.
//!
//! Children are selected by their managed-by label, so that the API server sends only what the operator made.
//! What is not read of an object is skipped when it arrives, see [`crate::decode`].

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::Arc;

use futures::{Stream, StreamExt, future};
use k8s_openapi::api::core::v1::Event as PodEvent;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::ApiResource;
use kube::core::DeserializeGuard;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;
use trustformers_control::kinds::{CHILDREN, ChildKind};
use trustformers_control::rollout::{RolloutState, observe};
use trustformers_control::routes::ModelKey;
use trustformers_control::{causes, names};
use trustformers_crds::InferenceModel;

use crate::ab_tests;
use crate::children::Child;
use crate::context::{Context, Unreadable, Writers, lane_of};
use crate::decode::{StoredModel, StoredObject, StoredPod};
use crate::definitions;
use crate::models::ModelWriter;
use crate::nodes;
use crate::pods::PodWriter;
use crate::queue::Lane;

/// Starts all watches.
pub fn spawn(context: &Arc<Context>, writers: Writers, tasks: &mut JoinSet<()>) {
    let Writers { models, pods, ab_tests } = writers;
    tasks.spawn(ab_tests::watch::watch(Arc::clone(context), ab_tests));
    tasks.spawn(watch_models(Arc::clone(context), models));
    tasks.spawn(watch_pods(Arc::clone(context), pods));
    tasks.spawn(nodes::run(Arc::clone(context)));
    tasks.spawn(definitions::run(Arc::clone(context)));
    for kind in CHILDREN.iter().filter(|kind| !kind.needs_definition) {
        tasks.spawn(watch_children(Arc::clone(context), kind));
    }
    for reason in causes::EVENT_REASONS {
        tasks.spawn(watch_pod_events(Arc::clone(context), reason));
    }
}

/// Models are decoded one by one, so that one which this version cannot decode does not stop the watch of
/// all.
async fn watch_models(context: Arc<Context>, mut writer: ModelWriter) {
    let api = Api::<StoredModel>::all(context.client.clone());
    let mut events = events(api, watcher::Config::default(), ManagedFields::Keep);
    let mut listed_unreadable = HashSet::new();
    while let Some(event) = events.next().await {
        let event = map(event, |StoredModel(model)| model);
        apply_model_event(&context, &mut writer, &mut listed_unreadable, event);
    }
}

/// Updates the caches and wakes the models that the event concerns.
pub(crate) fn apply_model_event(
    context: &Context,
    writer: &mut ModelWriter,
    listed_unreadable: &mut HashSet<ModelKey>,
    event: Event<DeserializeGuard<InferenceModel>>,
) {
    match event {
        Event::Init => {
            listed_unreadable.clear();
            writer.apply_watcher_event(&Event::Init);
        }
        Event::InitApply(DeserializeGuard(Ok(model))) => {
            context.set_unreadable(&key(&model.metadata), None);
            writer.apply_watcher_event(&Event::InitApply(model));
        }
        Event::InitApply(DeserializeGuard(Err(invalid))) => {
            let key = key(&invalid.metadata);
            listed_unreadable.insert(key.clone());
            context
                .set_unreadable(&key, Some(Unreadable { metadata: invalid.metadata, error: invalid.error }));
        }
        Event::InitDone => {
            writer.apply_watcher_event(&Event::InitDone);
            context.retain_models(listed_unreadable);
            wake_all(context);
        }
        Event::Apply(DeserializeGuard(Ok(model))) => {
            let key = key(&model.metadata);
            context.set_unreadable(&key, None);
            let is_new = context.model(&key).is_none();
            let lane = (!is_own_write(context, &key, &model)).then(|| lane_of(&model));
            writer.apply_watcher_event(&Event::Apply(model));
            if let Some(lane) = lane {
                context.request(&key.0, &key.1, lane);
            }
            // It may have an older namesake, or be the older one.
            if is_new {
                wake_namesakes(context, &key);
            }
        }
        // The last version that could be decoded stays in the cache, so that its route stays.
        Event::Apply(DeserializeGuard(Err(invalid))) => {
            let key = key(&invalid.metadata);
            context
                .set_unreadable(&key, Some(Unreadable { metadata: invalid.metadata, error: invalid.error }));
        }
        Event::Delete(deleted) => {
            let key = key(deleted.meta());
            if let Some(model) = context.model(&key) {
                writer.apply_watcher_event(&Event::Delete(InferenceModel::clone(&model)));
            }
            context.drop_model(&key);
            wake_namesakes(context, &key);
        }
    }
}

/// Whether a change of a model is only the status that the operator wrote itself. The event may arrive before
/// the response to the write, so statuses are compared and not resource versions.
fn is_own_write(context: &Context, key: &ModelKey, model: &InferenceModel) -> bool {
    let memory = context.memory(key, model.metadata.uid.as_deref().unwrap_or_default());
    model.metadata.deletion_timestamp.is_none()
        && memory.generation == model.metadata.generation
        && observe::commands(model.metadata.annotations.as_ref()).iter().all(|(command, text)| {
            // A command that was followed or refused is in the status.
            model.status.as_ref().is_some_and(|status| RolloutState::of(status).has_consumed(*command, text))
        })
        && memory.written.is_some_and(|written| Some(&written.status) == model.status.as_ref())
}

async fn watch_pods(context: Arc<Context>, mut writer: PodWriter) {
    let api = Api::<StoredPod>::all(context.client.clone());
    let config = watcher::Config::default().labels(names::MANAGED_SELECTOR);
    let mut events = events(api, config, ManagedFields::Keep);
    while let Some(event) = events.next().await {
        let event = map(event, |StoredPod(pod)| pod);
        for (namespace, name) in writer.apply_watcher_event(&event) {
            context.request(&namespace, &name, Lane::Child);
        }
    }
}

/// Follows the children of one kind without end.
pub(crate) async fn watch_children(context: Arc<Context>, kind: &'static ChildKind) {
    let api = Api::<StoredObject>::all_with(context.client.clone(), &resource(kind));
    let config = watcher::Config::default().labels(names::MANAGED_SELECTOR);
    let mut events = events(api, config, ManagedFields::Keep);
    while let Some(event) = events.next().await {
        apply_child_event(&context, kind, event);
    }
}

/// Updates the cache of children and wakes the model that the event concerns.
pub(crate) fn apply_child_event(context: &Context, kind: &'static ChildKind, event: Event<StoredObject>) {
    match event {
        Event::Apply(object) | Event::InitApply(object) => {
            let Some(child) = Child::of(kind, object) else { return };
            if let Some(child) = context.children.insert_watched(child) {
                wake_model_of(context, &child);
            }
        }
        // Deleted, or no longer selected because somebody changed its label.
        Event::Delete(object) => {
            let Some(child) = Child::of(kind, object) else { return };
            context.children.remove(&child);
            wake_model_of(context, &child);
        }
        Event::Init => context.children.start_list(kind),
        Event::InitDone => {
            context.children.finish_list(kind);
            wake_all(context);
        }
    }
}

/// Some causes are in Events only, such as a volume that cannot be mounted.
async fn watch_pod_events(context: Arc<Context>, reason: &'static str) {
    let api = Api::<PodEvent>::all(context.client.clone());
    let selector = format!("involvedObject.kind=Pod,reason={reason}");
    let mut events = events(api, watcher::Config::default().fields(&selector), ManagedFields::Drop);
    while let Some(event) = events.next().await {
        if let Event::Apply(event) | Event::InitApply(event) = event {
            apply_pod_event(&context, &event);
        }
    }
}

/// Records the cause of an Event about a pod of a model and wakes the model.
pub(crate) fn apply_pod_event(context: &Context, event: &PodEvent) {
    let Some(cause) = causes::of_event(event) else { return };
    let about = &event.involved_object;
    let (namespace, name) = (about.namespace.as_deref(), about.name.as_deref());
    let Some((namespace, name)) = namespace.zip(name) else { return };
    let Some(pod) = context.pods.get(namespace, name) else { return };
    if about.uid.as_ref() == Some(&pod.view.uid) && context.record_pod_event(&pod.view.uid, cause) {
        context.request(namespace, &pod.view.model, Lane::Child);
    }
}

/// What happens to the managed fields of an object on arrival.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum ManagedFields {
    /// They stay.
    Keep,
    /// They are dropped.
    Drop,
}

/// Events of one kind, without end: errors are logged, and the watch starts again after growing pauses.
pub(crate) fn events<K>(
    api: Api<K>,
    config: watcher::Config,
    managed_fields: ManagedFields,
) -> impl Stream<Item = Event<K>> + Send + Unpin
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    K::DynamicType: Send,
{
    let url = api.resource_url().to_owned();
    watcher::watcher(api, config)
        .modify(move |object| {
            if managed_fields == ManagedFields::Drop {
                object.managed_fields_mut().clear();
            }
        })
        .default_backoff()
        .filter_map(move |event| {
            let event =
                event.inspect_err(|error| tracing::warn!(url, %error, "a watch failed and starts again"));
            future::ready(event.ok())
        })
        .boxed()
}

/// The same event with another object.
fn map<A, B>(event: Event<A>, object: impl FnOnce(A) -> B) -> Event<B> {
    match event {
        Event::Apply(one) => Event::Apply(object(one)),
        Event::Delete(one) => Event::Delete(object(one)),
        Event::Init => Event::Init,
        Event::InitApply(one) => Event::InitApply(object(one)),
        Event::InitDone => Event::InitDone,
    }
}

/// The resource of a kind of children.
pub(crate) fn resource(kind: &ChildKind) -> ApiResource {
    ApiResource {
        group: kind.group.to_owned(),
        version: kind.version.to_owned(),
        api_version: kind.api_version(),
        kind: kind.kind.to_owned(),
        plural: kind.plural.to_owned(),
    }
}

fn key(metadata: &ObjectMeta) -> ModelKey {
    (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default())
}

fn wake_namesakes(context: &Context, (namespace, name): &ModelKey) {
    for (other, _) in context.names.namesakes(name).into_keys().filter(|(other, _)| other != namespace) {
        context.request(&other, name, Lane::Status);
    }
}

/// Wakes the model that owns a child, or that the child's label names if its owner reference was removed.
fn wake_model_of(context: &Context, child: &Child) {
    let owner = child.owner.as_ref().map(|owner| owner.name.as_str());
    if let Some(model) = owner.or_else(|| child.label(names::MODEL_LABEL)) {
        context.request(&child.namespace, model, Lane::Child);
    }
}

/// After a new list: objects may have been deleted while no watch was open.
pub(crate) fn wake_all(context: &Context) {
    for model in context.models.state() {
        let (namespace, name) = key(&model.metadata);
        context.request(&namespace, &name, lane_of(&model));
    }
}

#[cfg(test)]
mod faults;

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::time::Duration;

    use http::StatusCode;
    use serde_json::{Value, json};
    use tokio::time::sleep;

    use crate::context::NewContext;
    use crate::context::tests::{metrics, settings};
    use crate::testing::{MockRequest, mock_client};

    /// Each watch delivers one pod and ends; the third one fails.
    fn answer(request: &MockRequest, versions: &mut Vec<String>) -> Value {
        let query = request.uri.query().unwrap_or_default();
        if !query.contains("watch=true") {
            return json!({"kind": "List", "metadata": {"resourceVersion": "5"}, "items": []});
        }
        let version = query.split('&').find_map(|one| one.strip_prefix("resourceVersion="));
        versions.push(version.unwrap_or_default().to_owned());
        let number = versions.len();
        if number > 2 {
            return Value::Null;
        }
        json!({"type": "ADDED", "object": {"apiVersion": "v1", "kind": "Pod", "metadata": {
            "name": format!("p{number}"), "namespace": "team", "uid": format!("u{number}"),
            "resourceVersion": (number * 10).to_string(),
            "labels": {"serving.trustformers.dev/model": "chat", "serving.trustformers.dev/revision": "r"}}}})
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_watch_goes_on_after_the_last_version_that_it_delivered() {
        let versions = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&versions);
        let client = mock_client(move |request| (StatusCode::OK, answer(&request, &mut log.lock().unwrap())));
        let NewContext { context, writers, queue: _ } = Context::create(client, settings(), metrics());
        let watch = tokio::spawn(watch_pods(Arc::clone(&context), writers.pods));
        while context.pods.len() < 2 {
            sleep(Duration::from_millis(10)).await;
        }
        watch.abort();
        assert_eq!(versions.lock().unwrap()[..2], ["5", "10"]);
    }
}

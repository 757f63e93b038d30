//! The watches that fill the caches, and whom each change wakes.
//!
//! Children are found by their managed-by label, so that the API server sends only what is ours. Managed fields are
//! dropped on arrival: they are the larger half of an object and nobody here reads them.

use std::fmt::Debug;
use std::sync::Arc;

use futures::{Stream, StreamExt, future};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::runtime::reflector::store::Writer;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;
use trustformers_control::names;
use trustformers_crds::InferenceModel;

use crate::world::{World, Writers};

/// Starts all watches.
pub fn spawn(world: &Arc<World>, writers: Writers, tasks: &mut JoinSet<()>) {
    let Writers { models, service_accounts, config_maps, services, deployments, budgets, pods } = writers;
    tasks.spawn(watch_models(Arc::clone(world), models));
    tasks.spawn(watch_pods(Arc::clone(world), pods));
    tasks.spawn(watch_children::<ServiceAccount>(Arc::clone(world), service_accounts));
    tasks.spawn(watch_children::<ConfigMap>(Arc::clone(world), config_maps));
    tasks.spawn(watch_children::<Service>(Arc::clone(world), services));
    tasks.spawn(watch_children::<Deployment>(Arc::clone(world), deployments));
    tasks.spawn(watch_children::<PodDisruptionBudget>(Arc::clone(world), budgets));
}

async fn watch_models(world: Arc<World>, mut writer: Writer<InferenceModel>) {
    let mut events = events::<InferenceModel>(&world, watcher::Config::default());
    while let Some(event) = events.next().await {
        writer.apply_watcher_event(&event);
        match &event {
            Event::Apply(model) | Event::InitApply(model) => {
                wake_model(&world, model).await;
                // A model without a status is new: it may have an older namesake that it must be told of.
                if model.status.is_none() {
                    wake_namesakes(&world, model).await;
                }
            }
            Event::Delete(model) => {
                let key = (model.namespace().unwrap_or_default(), model.name_any());
                world.forget_model(&key);
                wake_namesakes(&world, model).await;
            }
            Event::Init => {}
            Event::InitDone => wake_all(&world).await,
        }
        world.routes_changed.notify_one();
    }
}

async fn watch_pods(world: Arc<World>, mut writer: Writer<Pod>) {
    let mut events = events::<Pod>(&world, watcher::Config::default().labels(names::MANAGED_SELECTOR));
    while let Some(event) = events.next().await {
        writer.apply_watcher_event(&event);
        match &event {
            Event::Apply(pod) | Event::InitApply(pod) => wake_owner(&world, pod).await,
            Event::Delete(pod) => {
                world.forget_pod(pod.metadata.uid.as_deref().unwrap_or_default());
                wake_owner(&world, pod).await;
            }
            Event::Init => {}
            Event::InitDone => wake_all(&world).await,
        }
        world.routes_changed.notify_one();
        world.gates_changed.notify_one();
        world.pods_changed.notify_one();
    }
}

async fn watch_children<K>(world: Arc<World>, mut writer: Writer<K>)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let mut events = events::<K>(&world, watcher::Config::default().labels(names::MANAGED_SELECTOR));
    while let Some(event) = events.next().await {
        writer.apply_watcher_event(&event);
        match &event {
            Event::Apply(child) | Event::InitApply(child) | Event::Delete(child) => {
                wake_owner(&world, child).await;
            }
            Event::Init => {}
            Event::InitDone => wake_all(&world).await,
        }
    }
}

/// Events of one kind in all namespaces, for ever: errors are logged and retried with growing pauses.
fn events<K>(world: &Arc<World>, config: watcher::Config) -> impl Stream<Item = Event<K>> + Send + Unpin
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let kind = K::kind(&());
    watch(Api::<K>::all(world.client.clone()), config)
        .modify(|object| object.managed_fields_mut().clear())
        .default_backoff()
        .filter_map(move |event| {
            let told =
                event.inspect_err(|error| tracing::warn!(%kind, %error, "watch failed; it is tried again"));
            future::ready(told.ok())
        })
        .boxed()
}

async fn wake_model(world: &World, model: &InferenceModel) {
    world.reconcile_soon(&model.namespace().unwrap_or_default(), &model.name_any()).await;
}

async fn wake_namesakes(world: &World, model: &InferenceModel) {
    let name = model.name_any();
    let others = world.caches.models.state_filter(|other: &InferenceModel| {
        other.metadata.name.as_deref() == Some(&name) && other.metadata.namespace != model.metadata.namespace
    });
    for other in others {
        wake_model(world, &other).await;
    }
}

async fn wake_owner<K: Resource>(world: &World, child: &K) {
    let meta = child.meta();
    let model = meta.labels.as_ref().and_then(|labels| labels.get(names::MODEL_LABEL));
    if let (Some(namespace), Some(model)) = (&meta.namespace, model) {
        world.reconcile_soon(namespace, model).await;
    }
}

/// After a new list: objects may have gone while nobody watched.
async fn wake_all(world: &World) {
    for model in world.caches.models.state() {
        wake_model(world, &model).await;
    }
}

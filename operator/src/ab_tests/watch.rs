//! The watch of tests. They are decoded one by one, so that one which this version cannot decode does not
//! stop the watch of all; the last version that could be decoded stays.

use std::sync::Arc;

use futures::StreamExt;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::reflector::store::Writer;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Resource};
use trustformers_crds::ABTest;

use crate::context::Context;
use crate::watchers::{ManagedFields, events};

/// Watches tests without end.
pub(crate) async fn watch(context: Arc<Context>, mut writer: Writer<ABTest>) {
    let api = Api::<DeserializeGuard<ABTest>>::all(context.client.clone());
    let mut events = events(api, watcher::Config::default(), ManagedFields::Drop);
    while let Some(event) = events.next().await {
        apply_event(&context, &mut writer, event);
        context.routes_changed.notify_one();
        context.ab_tests_changed.notify_one();
    }
}

/// Updates the cache.
pub(crate) fn apply_event(
    context: &Context,
    writer: &mut Writer<ABTest>,
    event: Event<DeserializeGuard<ABTest>>,
) {
    match event {
        Event::Init => writer.apply_watcher_event(&Event::Init),
        Event::InitDone => writer.apply_watcher_event(&Event::InitDone),
        Event::InitApply(DeserializeGuard(Ok(test))) => {
            writer.apply_watcher_event(&Event::InitApply(test));
        }
        Event::Apply(DeserializeGuard(Ok(test))) => writer.apply_watcher_event(&Event::Apply(test)),
        Event::InitApply(DeserializeGuard(Err(invalid))) | Event::Apply(DeserializeGuard(Err(invalid))) => {
            let name = invalid.metadata.name;
            tracing::warn!(
                name,
                error = invalid.error,
                "a stored ABTest cannot be decoded; upgrade the operator"
            );
        }
        Event::Delete(deleted) => {
            let meta = deleted.meta();
            let (Some(namespace), Some(name)) = (&meta.namespace, &meta.name) else { return };
            if let Some(test) = context.ab_tests.get(&ObjectRef::new(name).within(namespace)) {
                writer.apply_watcher_event(&Event::Delete(ABTest::clone(&test)));
            }
        }
    }
}

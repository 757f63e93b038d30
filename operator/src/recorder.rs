//! Publishes Events about models.
//!
//! The name of an Event is a hash of what it says, so that saying it again, even by another leader, marks the one Event
//! as repeated, with its latest time, instead of making a second. The recorder of kube keeps the first note of a reason and cannot be used for causes whose
//! note is what matters.

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Resource};
use serde_json::json;
use trustformers_control::events::Happening;
use trustformers_control::{hash, names};
use trustformers_crds::InferenceModel;

use crate::world::World;

/// Publishes what happened to `model`. An Event that cannot be published is logged and never holds up the rest.
pub async fn publish(world: &World, model: &InferenceModel, happenings: &[Happening]) {
    for happening in happenings {
        tracing::info!(
            model = model.metadata.name,
            namespace = model.metadata.namespace,
            reason = happening.reason,
            note = happening.note,
            "event"
        );
        match publish_one(world, model, happening).await {
            Ok(()) => world.metrics.told(happening.warning),
            Err(error) => {
                tracing::warn!(%error, reason = happening.reason, "an Event could not be published");
            }
        }
    }
}

async fn publish_one(
    world: &World,
    model: &InferenceModel,
    happening: &Happening,
) -> Result<(), kube::Error> {
    let about = model.object_ref(&());
    let events =
        Api::<Event>::namespaced(world.client.clone(), about.namespace.as_deref().unwrap_or("default"));
    let now = MicroTime(Timestamp::now());
    let event = event(about, happening, now.clone(), world.settings.pod_name.as_deref());
    match events.create(&PostParams::default(), &event).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => {
            let name = event.metadata.name.unwrap_or_default();
            // Only the leader publishes, so nobody counts at the same time.
            let known = events.get(&name).await?;
            let again = json!({"series": {"count": count_after(&known), "lastObservedTime": now}});
            events.patch(&name, &PatchParams::default(), &Patch::Merge(again)).await.map(drop)
        }
        other => other.map(drop),
    }
}

/// How often an Event that is there will have been said with this time: one that has no series was said once.
fn count_after(known: &Event) -> i32 {
    known.series.as_ref().map_or(1, |series| series.count).saturating_add(1)
}

fn event(about: ObjectReference, what: &Happening, now: MicroTime, instance: Option<&str>) -> Event {
    let kind = if what.warning { "Warning" } else { "Normal" };
    let uid = about.uid.as_deref().unwrap_or_default();
    let digest = hash::short(&format!("{uid}\n{kind}\n{}\n{}", what.reason, what.note));
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{}.{digest}", about.name.as_deref().unwrap_or_default())),
            namespace: about.namespace.clone(),
            ..ObjectMeta::default()
        },
        action: Some("Reconcile".to_owned()),
        reason: Some(what.reason.clone()),
        note: Some(what.note.clone()),
        type_: Some(kind.to_owned()),
        event_time: Some(now),
        reporting_controller: Some(names::MANAGER.to_owned()),
        reporting_instance: Some(instance.unwrap_or(names::MANAGER).to_owned()),
        regarding: Some(about),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::events::v1::EventSeries;

    #[test]
    fn an_event_counts_how_often_it_was_said() {
        let mut known = Event::default();
        for wanted in [2, 3, 4] {
            assert_eq!(count_after(&known), wanted);
            let last_observed_time = MicroTime(Timestamp::UNIX_EPOCH);
            known.series = Some(EventSeries { count: count_after(&known), last_observed_time });
        }
    }

    #[test]
    fn the_same_words_have_the_same_name_and_other_words_another() {
        let about = ObjectReference {
            name: Some("chat".to_owned()),
            uid: Some("u".to_owned()),
            ..Default::default()
        };
        let name = |note: &str| {
            let what =
                Happening { warning: true, reason: "DigestMismatch".to_owned(), note: note.to_owned() };
            event(about.clone(), &what, MicroTime(Timestamp::UNIX_EPOCH), None).metadata.name.unwrap()
        };
        assert_eq!(name("a"), name("a"));
        assert_ne!(name("a"), name("b"));
        assert!(name("a").starts_with("chat."));
    }
}

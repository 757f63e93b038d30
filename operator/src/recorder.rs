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
    let event = event(about, happening, MicroTime(Timestamp::now()), world.settings.pod_name.as_deref());
    say(&events, event).await
}

/// Makes the Event, or counts it once more where it is there.
async fn say(events: &Api<Event>, event: Event) -> Result<(), kube::Error> {
    match events.create(&PostParams::default(), &event).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => {
            let name = event.metadata.name.unwrap_or_default();
            // Only the leader publishes, so nobody counts at the same time.
            let known = events.get(&name).await?;
            // One that has no series was said once.
            let count = known.series.map_or(1, |series| series.count).saturating_add(1);
            let again = json!({"series": {"count": count, "lastObservedTime": event.event_time}});
            events.patch(&name, &PatchParams::default(), &Patch::Merge(again)).await.map(drop)
        }
        other => other.map(drop),
    }
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
    use std::convert::Infallible;
    use std::sync::{Arc, Mutex};

    use http::{Method, Request, Response, StatusCode};
    use http_body_util::BodyExt;
    use kube::Client;
    use kube::client::Body;
    use serde_json::Value;
    use tower::service_fn;

    fn what(note: &str) -> Happening {
        Happening { warning: true, reason: "DigestMismatch".to_owned(), note: note.to_owned() }
    }

    fn about() -> ObjectReference {
        ObjectReference { name: Some("chat".to_owned()), uid: Some("u".to_owned()), ..Default::default() }
    }

    /// What an API server that holds at most one Event answers, and what it then holds.
    fn answer(shelf: &mut Option<Value>, method: &Method, body: &[u8]) -> (StatusCode, Value) {
        let body = || serde_json::from_slice::<Value>(body).unwrap();
        match (method, &mut *shelf) {
            (&Method::POST, Some(_)) => {
                let status = json!({"kind": "Status", "status": "Failure", "code": 409, "reason": "AlreadyExists", "message": ""});
                return (StatusCode::CONFLICT, status);
            }
            (&Method::POST, None) => *shelf = Some(body()),
            (&Method::PATCH, Some(event)) => event["series"] = body()["series"].clone(),
            (&Method::GET, Some(_)) => {}
            (method, _) => panic!("{method} of what is not there"),
        }
        (StatusCode::OK, shelf.clone().unwrap())
    }

    #[tokio::test]
    async fn an_event_counts_how_often_it_was_said() {
        let shelf = Arc::new(Mutex::new(None));
        let held = Arc::clone(&shelf);
        let service = service_fn(move |request: Request<Body>| {
            let held = Arc::clone(&held);
            async move {
                let method = request.method().clone();
                let bytes = request.into_body().collect().await.unwrap().to_bytes();
                let (status, body) = answer(&mut held.lock().unwrap(), &method, &bytes);
                let body = Body::from(serde_json::to_vec(&body).unwrap());
                Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap())
            }
        });
        let events = Api::<Event>::namespaced(Client::new(service, "default"), "default");
        for (second, wanted) in [(10, Value::Null), (20, json!(2)), (30, json!(3)), (40, json!(4))] {
            let now = MicroTime(Timestamp::from_second(second).unwrap());
            say(&events, event(about(), &what("a"), now, None)).await.unwrap();
            let held = shelf.lock().unwrap().clone().unwrap();
            assert_eq!(held["series"]["count"], wanted);
            let latest = held["series"]["lastObservedTime"].as_str();
            assert!(latest.is_none_or(|latest| latest.contains(&format!("00:00:{second}"))), "{latest:?}");
        }
    }

    #[test]
    fn the_same_words_have_the_same_name_and_other_words_another() {
        let name = |note: &str| {
            let now = MicroTime(Timestamp::UNIX_EPOCH);
            event(about(), &what(note), now, None).metadata.name.unwrap()
        };
        assert_eq!(name("a"), name("a"));
        assert_ne!(name("a"), name("b"));
        assert!(name("a").starts_with("chat."));
    }
}

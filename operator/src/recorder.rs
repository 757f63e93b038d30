//! Publishes Events about models.
//!
//! The name of an Event is a hash of model, type and reason. If the same happens again, even under another
//! leader or with other words, that Event gets a higher count, the latest time and the latest message, and no
//! second Event is made. The core/v1 API is used because events.k8s.io/v1 does not allow a new message. The
//! recorder of kube keeps the first message of a reason.

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Resource};
use serde_json::json;
use trustformers_control::events::EventNote;
use trustformers_control::routes::ModelKey;
use trustformers_control::{hash, names};
use trustformers_crds::InferenceModel;

use crate::context::Context;

/// The reference to a model in its Events.
#[must_use]
pub fn about((namespace, name): &ModelKey, uid: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some(InferenceModel::api_version(&()).into_owned()),
        kind: Some(InferenceModel::kind(&()).into_owned()),
        namespace: Some(namespace.clone()),
        name: Some(name.clone()),
        uid: Some(uid.to_owned()),
        ..ObjectReference::default()
    }
}

/// Publishes Events about a model. An Event that cannot be published is logged and does not stop the others.
pub async fn publish(context: &Context, about: &ObjectReference, notes: &[EventNote]) {
    for note in notes {
        let (model, namespace) = (&about.name, &about.namespace);
        tracing::info!(model, namespace, reason = note.reason, note = note.note, "event");
        let events =
            Api::<Event>::namespaced(context.client.clone(), about.namespace.as_deref().unwrap_or("default"));
        let instance = context.settings.pod_name.as_deref();
        match create_or_count(&events, event(about, note, Timestamp::now(), instance)).await {
            Ok(()) => context.metrics.count_event(note.warning),
            Err(error) => {
                tracing::warn!(%error, reason = note.reason, "an Event could not be published");
            }
        }
    }
}

/// Creates the Event, or increments its count if it exists.
async fn create_or_count(events: &Api<Event>, event: Event) -> Result<(), kube::Error> {
    match events.create(&PostParams::default(), &event).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => {
            let name = event.metadata.name.unwrap_or_default();
            // Only the leader publishes, so there is no other writer.
            let count = events.get(&name).await?.count.unwrap_or(1).saturating_add(1);
            let again =
                json!({"count": count, "lastTimestamp": event.last_timestamp, "message": event.message});
            events.patch(&name, &PatchParams::default(), &Patch::Merge(again)).await.map(drop)
        }
        other => other.map(drop),
    }
}

fn event(about: &ObjectReference, note: &EventNote, now: Timestamp, instance: Option<&str>) -> Event {
    let kind = if note.warning { "Warning" } else { "Normal" };
    let uid = about.uid.as_deref().unwrap_or_default();
    let digest = hash::short(&format!("{uid}\n{kind}\n{}", note.reason));
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{}.{digest}", about.name.as_deref().unwrap_or_default())),
            namespace: about.namespace.clone(),
            ..ObjectMeta::default()
        },
        action: Some("Reconcile".to_owned()),
        count: Some(1),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        reason: Some(note.reason.clone()),
        message: Some(note.note.clone()),
        type_: Some(kind.to_owned()),
        source: Some(EventSource { component: Some(names::MANAGER.to_owned()), host: None }),
        reporting_component: Some(names::MANAGER.to_owned()),
        reporting_instance: Some(instance.unwrap_or(names::MANAGER).to_owned()),
        involved_object: about.clone(),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    use http::{Method, StatusCode};
    use serde_json::Value;

    use crate::testing::{MockRequest, mock_client};

    fn note(reason: &str, text: &str) -> EventNote {
        EventNote { warning: true, reason: reason.to_owned(), note: text.to_owned() }
    }

    fn chat() -> ObjectReference {
        about(&("default".to_owned(), "chat".to_owned()), "u")
    }

    /// An API server that stores at most one Event.
    fn answer(stored: &mut Option<Value>, request: &MockRequest) -> (StatusCode, Value) {
        match (&request.method, &mut *stored) {
            (&Method::POST, Some(_)) => {
                let status = json!({"kind": "Status", "status": "Failure", "code": 409, "reason": "AlreadyExists", "message": ""});
                return (StatusCode::CONFLICT, status);
            }
            (&Method::POST, None) => *stored = Some(request.body.clone()),
            (&Method::PATCH, Some(event)) => {
                for (key, value) in request.body.as_object().unwrap() {
                    event[key] = value.clone();
                }
            }
            (&Method::GET, Some(_)) => {}
            (method, _) => panic!("{method} of an object that does not exist"),
        }
        (StatusCode::OK, stored.clone().unwrap())
    }

    #[tokio::test]
    async fn one_reason_is_one_event_with_a_count() {
        let stored = Arc::new(Mutex::new(None));
        let held = Arc::clone(&stored);
        let client = mock_client(move |request| answer(&mut held.lock().unwrap(), &request));
        let events = Api::<Event>::namespaced(client, "default");
        for (second, count) in [(10, 1), (20, 2), (30, 3)] {
            let text = format!("0/{second} nodes are available");
            let now = Timestamp::from_second(second).unwrap();
            let event = event(&chat(), &note("Unschedulable", &text), now, None);
            create_or_count(&events, event).await.unwrap();
            let event = stored.lock().unwrap().clone().unwrap();
            assert_eq!(event["count"], count);
            assert_eq!(event["message"], text);
            assert!(event["lastTimestamp"].as_str().unwrap().contains(&format!("00:00:{second}")), "{event}");
        }
    }

    #[test]
    fn the_name_of_an_event_depends_on_its_reason_only() {
        let name = |reason: &str, text: &str| {
            event(&chat(), &note(reason, text), Timestamp::UNIX_EPOCH, None).metadata.name.unwrap()
        };
        assert_eq!(name("Unschedulable", "0/57 nodes"), name("Unschedulable", "0/58 nodes"));
        assert_ne!(name("Unschedulable", "0/57 nodes"), name("OOMKilled", "0/57 nodes"));
        assert!(name("Unschedulable", "").starts_with("chat."));
    }
}

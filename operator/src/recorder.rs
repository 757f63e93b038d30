//! Publishes Events about models.
//!
//! The name of an Event is a hash of model, type and reason. If the same happens again, even under another
//! leader or with other words, that Event gets a higher count, the latest time and the latest message, and no
//! second Event is made. The core/v1 API is used because events.k8s.io/v1 does not allow a new message. The
//! recorder of kube keeps the first message of a reason.
//!
//! The counts of the last Events are remembered: a repetition costs one request, and one with the same words
//! within [`REPEAT_INTERVAL`] costs none and is counted in the next.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Resource};
use serde_json::json;
use tokio::time::Instant;
use trustformers_control::events::EventNote;
use trustformers_control::routes::ModelKey;
use trustformers_control::{hash, names};
use trustformers_crds::InferenceModel;

use crate::context::Context;

/// The same Event is published again only after this time.
pub const REPEAT_INTERVAL: Duration = Duration::from_secs(120);

/// Events whose counts are remembered. An entry takes about 300 bytes: 4096 × 300 B = 1.2 MB. Beyond that,
/// the older half is dropped; a repetition of one of those reads its count first.
const REMEMBERED: usize = 4096;

#[derive(Debug, Clone)]
struct PublishedEvent {
    message: String,
    count: i32,
    at: Instant,
}

/// What is remembered of published Events, by namespace and name.
#[derive(Debug, Default)]
pub struct EventCounts(Mutex<HashMap<(String, String), PublishedEvent>>);

/// What an Event that happened needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Publication {
    /// It may be new.
    Create,
    /// It exists, with this count now.
    Count(i32),
    /// It was published a short time ago.
    Nothing,
}

impl EventCounts {
    fn lock(&self) -> MutexGuard<'_, HashMap<(String, String), PublishedEvent>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, event: &Event) -> Publication {
        let mut published = self.lock();
        let Some(earlier) = published.get_mut(&key(event)) else { return Publication::Create };
        earlier.count = earlier.count.saturating_add(1);
        let is_same = Some(&earlier.message) == event.message.as_ref();
        if is_same && earlier.at.elapsed() < REPEAT_INTERVAL {
            return Publication::Nothing;
        }
        Publication::Count(earlier.count)
    }

    fn set(&self, event: &Event, count: i32) {
        let mut published = self.lock();
        if published.len() >= REMEMBERED {
            let mut times: Vec<Instant> = published.values().map(|one| one.at).collect();
            times.sort_unstable();
            let middle = times[times.len() / 2];
            published.retain(|_, one| one.at > middle);
        }
        let message = event.message.clone().unwrap_or_default();
        published.insert(key(event), PublishedEvent { message, count, at: Instant::now() });
    }

    fn forget(&self, event: &Event) {
        self.lock().remove(&key(event));
    }
}

fn key(event: &Event) -> (String, String) {
    let meta = &event.metadata;
    (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

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
        let event = event(about, note, Timestamp::now(), instance);
        match create_or_count(&context.event_counts, &events, event).await {
            Ok(()) => context.metrics.count_event(note.warning),
            Err(error) => {
                tracing::warn!(%error, reason = note.reason, "an Event could not be published");
            }
        }
    }
}

/// Creates the Event, or increments its count if it exists. Only the leader publishes, so there is no other
/// writer.
async fn create_or_count(counts: &EventCounts, events: &Api<Event>, event: Event) -> Result<(), kube::Error> {
    let name = event.metadata.name.clone().unwrap_or_default();
    let count = match counts.record(&event) {
        Publication::Nothing => return Ok(()),
        Publication::Count(count) => count,
        Publication::Create => match events.create(&PostParams::default(), &event).await {
            Ok(_) => {
                counts.set(&event, 1);
                return Ok(());
            }
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                events.get(&name).await?.count.unwrap_or(1).saturating_add(1)
            }
            Err(error) => return Err(error),
        },
    };
    let again = json!({"count": count, "lastTimestamp": event.last_timestamp, "message": event.message});
    match events.patch(&name, &PatchParams::default(), &Patch::Merge(again)).await {
        Ok(_) => {
            counts.set(&event, count);
            Ok(())
        }
        Err(error) => {
            // It has expired, or its count is not certain: the next one looks.
            counts.forget(&event);
            Err(error)
        }
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

    /// The number of requests, and what is stored.
    type Recorded = Arc<Mutex<(usize, Option<Value>)>>;

    fn events(recorded: &Recorded) -> Api<Event> {
        let recorded = Arc::clone(recorded);
        let client = mock_client(move |request| {
            let mut recorded = recorded.lock().unwrap();
            recorded.0 += 1;
            answer(&mut recorded.1, &request)
        });
        Api::namespaced(client, "default")
    }

    #[tokio::test]
    async fn one_reason_is_one_event_with_a_count() {
        let recorded = Recorded::default();
        let events = events(&recorded);
        for (second, count) in [(10, 1), (20, 2), (30, 3)] {
            // Each is another leader, which remembers nothing.
            let counts = EventCounts::default();
            let text = format!("0/{second} nodes are available");
            let now = Timestamp::from_second(second).unwrap();
            let event = event(&chat(), &note("Unschedulable", &text), now, None);
            create_or_count(&counts, &events, event).await.unwrap();
            let event = recorded.lock().unwrap().1.clone().unwrap();
            assert_eq!(event["count"], count);
            assert_eq!(event["message"], text);
            assert!(event["lastTimestamp"].as_str().unwrap().contains(&format!("00:00:{second}")), "{event}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_repetition_with_the_same_words_is_counted_and_published_later() {
        let (recorded, counts) = (Recorded::default(), EventCounts::default());
        let events = events(&recorded);
        let publish = |text: &'static str| {
            let event = event(&chat(), &note("CrashLoopBackOff", text), Timestamp::UNIX_EPOCH, None);
            create_or_count(&counts, &events, event)
        };
        for _ in 0..5 {
            publish("exit code 9").await.unwrap();
        }
        assert_eq!(recorded.lock().unwrap().0, 1, "one request");
        // Other words are news.
        publish("exit code 1").await.unwrap();
        tokio::time::advance(REPEAT_INTERVAL).await;
        publish("exit code 1").await.unwrap();
        let recorded = recorded.lock().unwrap();
        assert_eq!((recorded.0, &recorded.1.as_ref().unwrap()["count"]), (3, &json!(7)));
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

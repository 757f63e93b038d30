//! An API server in the memory of this process, as far as the operator uses one for models that start: lists,
//! watches, POST and patches of statuses, with resource versions and managed fields. It counts requests.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use crate::cluster;

const MANAGER: &str = "trustformers-operator";

/// Kind (as its plural), namespace and name of an object.
type ObjectName = (String, String, String);

/// One change of an object, as watches send it. Every change of a run is kept: about 20 for each model, of 5
/// KiB each, so 100 MiB for 1,000 models.
struct LoggedChange {
    version: u64,
    namespace: String,
    line: Bytes,
}

#[derive(Default)]
struct Contents {
    version: u64,
    objects: BTreeMap<ObjectName, Value>,
    /// Those of the models that are ready.
    ready_models: BTreeSet<ObjectName>,
    changes: HashMap<String, Vec<LoggedChange>>,
    requests: BTreeMap<String, u64>,
}

/// The API server.
#[derive(Clone)]
pub(crate) struct LoopbackServer {
    contents: Arc<Mutex<Contents>>,
    /// Wakes watches: the last version of all.
    newest: watch::Sender<u64>,
    ready_models: watch::Sender<usize>,
}

impl LoopbackServer {
    /// A server without objects.
    pub(crate) fn new() -> Self {
        Self { contents: Arc::default(), newest: watch::Sender::new(0), ready_models: watch::Sender::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its HTTP.
    pub(crate) fn router(&self) -> Router {
        Router::new().fallback(answer).with_state(self.clone())
    }

    /// Creates or replaces an object, and tells watches.
    pub(crate) fn put(&self, plural: &str, object: Value) -> Value {
        let stored = self.lock().put(plural, object);
        self.wake_watches();
        stored
    }

    fn wake_watches(&self) {
        self.newest.send_replace(self.lock().version);
        // Counted in here, so that a later count is never replaced by an earlier one.
        self.ready_models.send_if_modified(|count| {
            let ready = self.lock().ready_models.len();
            std::mem::replace(count, ready) != ready
        });
    }

    /// Models that are ready.
    pub(crate) fn ready_models(&self) -> usize {
        *self.ready_models.borrow()
    }

    /// Waits until at least `count` models are ready.
    pub(crate) async fn until_ready(&self, count: usize) {
        // The sender is part of this value, so that the wait has no other end.
        let _ready = self.ready_models.subscribe().wait_for(|ready| *ready >= count).await.map(drop);
    }

    /// The changes after a version, without end. It reads them from the log, so that a slow reader needs no
    /// queue.
    fn watch(&self, path: ObjectPath, since: u64) -> Body {
        let begin = (self.clone(), self.newest.subscribe(), since);
        Body::from_stream(stream::unfold(begin, move |(server, mut newest, mut since)| {
            let path = path.clone();
            async move {
                loop {
                    newest.mark_unchanged();
                    let next = server.lock().next_change(&path, since);
                    if let Some((version, line)) = next {
                        since = version;
                        return Some((Ok::<_, Infallible>(line), (server, newest, since)));
                    }
                    if newest.changed().await.is_err() {
                        return None;
                    }
                }
            }
        }))
    }

    /// Changes an object, if it exists, and tells watches.
    pub(crate) fn change(&self, plural: &str, namespace: &str, name: &str, change: impl FnOnce(&mut Value)) {
        let mut contents = self.lock();
        let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
        if let Some(mut object) = contents.objects.get(&key).cloned() {
            change(&mut object);
            contents.put(plural, object);
        }
        drop(contents);
        self.wake_watches();
    }

    /// Requests so far, by verb and kind.
    pub(crate) fn requests(&self) -> BTreeMap<String, u64> {
        self.lock().requests.clone()
    }
}

impl Contents {
    fn put(&mut self, plural: &str, mut object: Value) -> Value {
        self.version += 1;
        let meta = &mut object["metadata"];
        let (namespace, name) = (text(&meta["namespace"]), text(&meta["name"]));
        if !meta["uid"].is_string() {
            meta["uid"] = json!(format!("{plural}-{}", self.version));
            meta["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
            meta["generation"] = json!(1);
        }
        meta["resourceVersion"] = json!(self.version.to_string());
        let key = (plural.to_owned(), namespace.clone(), name);
        if plural == "inferencemodels" && cluster::is_ready(&object) {
            self.ready_models.insert(key.clone());
        } else {
            self.ready_models.remove(&key);
        }
        let is_new = self.objects.insert(key, object.clone()).is_none();
        self.log(plural, namespace, if is_new { "ADDED" } else { "MODIFIED" }, &object);
        object
    }

    fn log(&mut self, plural: &str, namespace: String, change: &str, object: &Value) {
        let line = Bytes::from(format!("{}\n", json!({"type": change, "object": object})));
        let change = LoggedChange { version: self.version, namespace, line };
        self.changes.entry(plural.to_owned()).or_default().push(change);
    }

    fn list(&self, path: &ObjectPath) -> Value {
        let in_namespace = |namespace: &String| path.namespace.as_ref().is_none_or(|one| one == namespace);
        let of_kind = self
            .objects
            .iter()
            .filter(|((plural, namespace, _), _)| *plural == path.plural && in_namespace(namespace));
        let items: Vec<&Value> = of_kind.map(|(_, object)| object).collect();
        json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": self.version.to_string()},
            "items": items})
    }

    /// The first change after a version. Versions of the log grow.
    fn next_change(&self, path: &ObjectPath, since: u64) -> Option<(u64, Bytes)> {
        let changes = self.changes.get(&path.plural)?;
        let new = &changes[changes.partition_point(|change| change.version <= since)..];
        let wanted = |change: &&LoggedChange| {
            path.namespace.as_ref().is_none_or(|namespace| *namespace == change.namespace)
        };
        new.iter().find(wanted).map(|change| (change.version, change.line.clone()))
    }
}

/// What a request is about.
#[derive(Clone)]
struct ObjectPath {
    plural: String,
    namespace: Option<String>,
    name: Option<String>,
    is_status: bool,
}

impl ObjectPath {
    /// `/api/v1/...` or `/apis/GROUP/VERSION/...`.
    fn of(uri: &Uri) -> Option<Self> {
        let mut segments = uri.path().split('/').filter(|one| !one.is_empty());
        match segments.next()? {
            "api" => segments.next(),
            "apis" => segments.nth(1),
            _ => None,
        }?;
        let rest: Vec<&str> = segments.collect();
        let (namespace, rest) = match rest.as_slice() {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some((*namespace).to_owned()), rest),
            rest => (None, rest),
        };
        let plural = (*rest.first()?).to_owned();
        let name = rest.get(1).map(|name| (*name).to_owned());
        Some(Self { plural, namespace, name, is_status: rest.get(2) == Some(&"status") })
    }

    fn key(&self) -> ObjectName {
        let text = |one: &Option<String>| one.clone().unwrap_or_default();
        (self.plural.clone(), text(&self.namespace), text(&self.name))
    }
}

async fn answer(State(server): State<LoopbackServer>, method: Method, uri: Uri, body: Bytes) -> Response {
    let Some(path) = ObjectPath::of(&uri) else { return failure(StatusCode::NOT_FOUND) };
    let query = uri.query().unwrap_or_default();
    let is_watch = query.split('&').any(|one| one == "watch=true");
    let what = if path.is_status { format!("{}/status", path.plural) } else { path.plural.clone() };
    let verb = if is_watch { "WATCH" } else { method.as_str() };
    *server.lock().requests.entry(format!("{verb} {what}")).or_default() += 1;
    let body = serde_json::from_slice::<Value>(&body).unwrap_or_default();
    match method {
        Method::GET if is_watch => {
            let version = query.split('&').find_map(|one| one.strip_prefix("resourceVersion="));
            let since = version.and_then(|version| version.parse().ok()).unwrap_or(0);
            server.watch(path, since).into_response()
        }
        Method::GET if path.name.is_none() => axum::Json(server.lock().list(&path)).into_response(),
        Method::GET => {
            let found = server.lock().objects.get(&path.key()).cloned();
            found.map_or_else(|| failure(StatusCode::NOT_FOUND), |object| axum::Json(object).into_response())
        }
        Method::POST => axum::Json(create(&server, &path, body)).into_response(),
        Method::PATCH => {
            patch(&server, &path, &body).map_or_else(failure, |object| axum::Json(object).into_response())
        }
        _ => failure(StatusCode::METHOD_NOT_ALLOWED),
    }
}

fn failure(code: StatusCode) -> Response {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code.as_u16(),
        "reason": "x", "message": "this server does not do that"});
    (code, axum::Json(status)).into_response()
}

fn create(server: &LoopbackServer, path: &ObjectPath, mut object: Value) -> Value {
    let mut fields = object.clone();
    let meta = &object["metadata"];
    fields["metadata"] = json!({"labels": meta["labels"], "annotations": meta["annotations"],
        "ownerReferences": {}});
    object["metadata"]["managedFields"] = json!([entry(MANAGER, "", &fields)]);
    let stored = server.put(&path.plural, object);
    if path.plural == "deployments" {
        tokio::spawn(cluster::start_pod(server.clone(), stored.clone()));
    }
    stored
}

fn patch(server: &LoopbackServer, path: &ObjectPath, patch: &Value) -> Result<Value, StatusCode> {
    let mut contents = server.lock();
    let mut object = contents.objects.get(&path.key()).cloned().ok_or(StatusCode::NOT_FOUND)?;
    let was_ready = cluster::is_ready(&object);
    match (path.plural.as_str(), path.is_status) {
        ("inferencemodels", true) => {
            object["status"] = patch["status"].clone();
            add_entry(&mut object, entry(MANAGER, "status", &json!({"status": patch["status"]})));
        }
        ("pods", true) => {
            cluster::merge_conditions(&mut object, &patch["status"]["conditions"]);
            cluster::follow_gate(&mut object);
            add_entry(&mut object, entry(MANAGER, "status", &json!({"status": patch["status"]})));
        }
        _ => return Err(StatusCode::METHOD_NOT_ALLOWED),
    }
    let stored = contents.put(&path.plural, object);
    drop(contents);
    server.wake_watches();
    if path.plural == "pods" && !was_ready && cluster::is_ready(&stored) {
        tokio::spawn(cluster::complete_deployment(server.clone(), stored.clone()));
    }
    Ok(stored)
}

/// Adds an entry of managed fields, or replaces the one of the same manager and subresource.
pub(crate) fn add_entry(object: &mut Value, entry: Value) {
    let entries = &mut object["metadata"]["managedFields"];
    if !entries.is_array() {
        *entries = json!([]);
    }
    if let Some(entries) = entries.as_array_mut() {
        entries.retain(|one| {
            (&one["manager"], &one["subresource"]) != (&entry["manager"], &entry["subresource"])
        });
        entries.push(entry);
    }
}

/// An entry of managed fields with every field of a value.
pub(crate) fn entry(manager: &str, subresource: &str, fields: &Value) -> Value {
    let mut entry = json!({"manager": manager, "operation": "Update", "apiVersion": "v1",
        "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1", "fieldsV1": fields_of(fields)});
    if !subresource.is_empty() {
        entry["subresource"] = json!(subresource);
    }
    entry
}

fn fields_of(value: &Value) -> Value {
    let mut fields = Map::new();
    match value {
        Value::Object(members) => {
            for (key, value) in
                members.iter().filter(|(key, _)| !["apiVersion", "kind"].contains(&key.as_str()))
            {
                fields.insert(format!("f:{key}"), fields_of(value));
            }
        }
        Value::Array(items) => {
            for item in items {
                let name = [&item["name"], &item["type"]].into_iter().find(|one| one.is_string());
                fields.insert(format!("k:{}", json!({"name": name})), fields_of(item));
            }
        }
        _ => {}
    }
    Value::Object(fields)
}

/// A text, or the empty one.
pub(crate) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

//! The models of a routing table, as callers see them.

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use trustformers_api::http::state_word;
use trustformers_api::inference::Models;
use trustformers_proto::{Task, v1};

use crate::table::{Adapter, Backend, Route, Table};

/// One entry for each revision, so that both show during a rollout. An entry whose state is that of the table
/// before keeps the time since when it is in it.
pub(crate) fn of_table(table: &Table, received_at: SystemTime, before: &Models) -> Models {
    let now_ms = received_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let now_ms = u64::try_from(now_ms).unwrap_or(u64::MAX);
    let earlier: HashMap<EntryKey<'_>, u64> =
        before.iter().map(|model| (EntryKey::of(model), model.since_unix_ms)).collect();
    let revisions = |route: &Route| {
        let entries = route.backends.iter().map(|backend| {
            let mut model = status(route, backend);
            model.since_unix_ms = earlier.get(&EntryKey::of(&model)).copied().unwrap_or(now_ms);
            model
        });
        entries.collect::<Vec<_>>()
    };
    table.routes.iter().flat_map(revisions).collect()
}

/// What makes an entry the same from table to table.
#[derive(Debug, PartialEq, Eq, Hash)]
struct EntryKey<'a> {
    name: &'a str,
    revision: &'a str,
    state: i32,
}

impl<'a> EntryKey<'a> {
    fn of(model: &'a v1::ModelStatus) -> Self {
        Self { name: &model.name, revision: &model.revision, state: model.state }
    }
}

fn status(route: &Route, backend: &Backend) -> v1::ModelStatus {
    let state = state_of(backend);
    let message = format!("{} pod(s) are routed to, weight {}", backend.endpoints.len(), backend.weight);
    v1::ModelStatus {
        name: route.name.clone(),
        names: route.aliases.clone(),
        adapters: adapter_names(route),
        state: state.into(),
        digest: backend.digest.clone(),
        revision: backend.revision.clone(),
        message,
        task: Task::to_wire(route.task),
        ..Default::default()
    }
}

/// The own names of a route's adapters.
fn adapter_names(route: &Route) -> Vec<String> {
    let own = |adapter: &Adapter| adapter.name.rsplit(':').next().unwrap_or_default().to_owned();
    route.adapters.iter().map(own).collect()
}

fn state_of(backend: &Backend) -> v1::ModelState {
    if backend.endpoints.is_empty() { v1::ModelState::Pending } else { v1::ModelState::Ready }
}

/// OpenAI's model object of a route, with the revisions behind it. `created` is the time since when its
/// oldest revision is in its state.
pub(crate) fn json_of_route(route: &Route, models: &Models) -> Value {
    let entries = models.iter().filter(|model| model.name == route.name);
    let since_unix_ms = entries.map(|model| model.since_unix_ms).min().unwrap_or(0);
    json_of(route, since_unix_ms)
}

/// The object of an adapter: what is true of its model, under its own names and with the model as its parent.
pub(crate) fn json_of_adapter(route: &Route, adapter: &Adapter, models: &Models) -> Value {
    adapter_json(json_of_route(route, models), route, adapter)
}

fn adapter_json(mut of_model: Value, route: &Route, adapter: &Adapter) -> Value {
    of_model["id"] = json!(adapter.name);
    of_model["parent"] = json!(route.name);
    of_model["aliases"] = json!(adapter.aliases);
    of_model
}

/// The objects of every route and its adapters, in OpenAI's list shape.
pub(crate) fn json_of_table(table: &Table, models: &Models) -> Value {
    let mut since: HashMap<&str, u64> = HashMap::new();
    for model in models.iter() {
        let oldest = since.entry(&model.name).or_insert(u64::MAX);
        *oldest = model.since_unix_ms.min(*oldest);
    }
    let of_route = |route: &Route| {
        let model = json_of(route, since.get(route.name.as_str()).copied().unwrap_or(0));
        let adapters = route.adapters.iter().map(|adapter| adapter_json(model.clone(), route, adapter));
        let adapters: Vec<Value> = adapters.collect();
        std::iter::once(model).chain(adapters).collect::<Vec<_>>()
    };
    json!({"object": "list", "data": table.routes.iter().flat_map(of_route).collect::<Vec<_>>()})
}

fn json_of(route: &Route, since_unix_ms: u64) -> Value {
    let revisions: Vec<Value> = route
        .backends
        .iter()
        .map(|backend| {
            json!({
                "revision": backend.revision,
                "digest": backend.digest,
                "weight": backend.weight,
                "ready_endpoints": backend.endpoints.len(),
            })
        })
        .collect();
    // The revision that most requests get.
    let served = route.backends.iter().filter(|backend| !backend.endpoints.is_empty());
    let main = served.max_by_key(|backend| backend.weight).or(route.backends.first());
    let state = main.map_or(v1::ModelState::Pending, state_of);
    json!({
        "id": route.name,
        "object": "model",
        "created": since_unix_ms / 1000,
        "owned_by": "trustformers",
        "task": route.task,
        "state": state_word(state),
        "revision": main.map(|backend| &backend.revision),
        "digest": main.map(|backend| &backend.digest),
        "aliases": route.aliases,
        "ready_endpoints": route.endpoint_count(),
        "revisions": revisions,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{TableText, endpoint_at};
    use std::time::Duration;

    fn table(pods: usize) -> Table {
        let endpoints: Vec<_> = (0..pods).map(|pod| endpoint_at(&format!("p{pod}"), 1)).collect();
        let table = TableText::new(1, 1).route("d/a", &["a"]);
        Table::parse(table.backend("r1", 9, &endpoints).backend("r2", 1, &[]).wire()).unwrap()
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn an_entry_keeps_its_time_while_its_state_is_the_same() {
        let none = Models::from([]);
        let one = of_table(&table(1), at(100), &none);
        let two = of_table(&table(2), at(200), &one);
        let three = of_table(&table(0), at(300), &two);
        let since =
            |models: &Models| models.iter().map(|model| model.since_unix_ms / 1000).collect::<Vec<_>>();
        assert_eq!(
            (since(&one), since(&two), since(&three)),
            (vec![100, 100], vec![100, 100], vec![300, 100])
        );
        let states: Vec<_> = two.iter().map(v1::ModelStatus::state).collect();
        assert_eq!(states, [v1::ModelState::Ready, v1::ModelState::Pending]);
        assert_eq!(two[0].names, ["a"]);
    }

    #[test]
    fn the_list_has_what_openais_clients_read_and_the_revisions() {
        let models = of_table(&table(1), at(100), &Models::from([]));
        let list = json_of_table(&table(1), &models);
        let model = &list["data"][0];
        assert_eq!(
            (&list["object"], &model["id"], &model["object"]),
            (&json!("list"), &json!("d/a"), &json!("model"))
        );
        assert_eq!((&model["created"], &model["owned_by"]), (&json!(100), &json!("trustformers")));
        assert_eq!((&model["state"], &model["revision"]), (&json!("ready"), &json!("r1")));
        assert_eq!(model["revisions"][1]["ready_endpoints"], 0);
        assert_eq!(*model, json_of_route(&table(1).routes[0], &models));
        let mut with_adapter = TableText::new(1, 1).route("d/a", &["a"]).wire();
        with_adapter.routes[0].adapters = vec!["sql".to_owned()];
        let list = json_of_table(&Table::parse(with_adapter).unwrap(), &models);
        let adapter = &list["data"][1];
        assert_eq!((&adapter["id"], &adapter["parent"]), (&json!("d/a:sql"), &json!("d/a")));
        assert_eq!(adapter["aliases"], json!(["d/a:sql", "a:sql", "sql"]));
        let pending = json_of_table(&table(0), &models);
        assert_eq!(pending["data"][0]["state"], "pending");
    }
}

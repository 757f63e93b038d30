//! What is shown of a model: a row of a table, and its page with conditions, load, rollout and pods.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use serde::Serialize;
use trustformers_crds::names::{CONTAINER, REVISION_LABEL, ROUTABLE_GATE};
use trustformers_crds::{InferenceModel, InferenceModelStatus, Loading};

use crate::table::{Table, one_line};
use crate::text;

/// A model in short.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelRow {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Pods that serve.
    pub ready_replicas: i32,
    /// Pods that should.
    pub replicas: i32,
    /// Its state in one word; empty before the operator has looked at it.
    pub phase: String,
    /// The revision that serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The revision that is rolled out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub candidate: Option<CandidateRow>,
    /// Where the rollout is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollout: Option<String>,
    /// The load that is in progress.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loading: Option<LoadProgress>,
    /// The device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Where callers reach it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// When it was created.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    #[serde(skip)]
    age: String,
}

/// The revision that is rolled out.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CandidateRow {
    /// The revision.
    pub revision: String,
    /// Percent of the requests that it gets.
    pub weight: u32,
}

/// A load that is in progress.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadProgress {
    /// Bytes read so far.
    pub bytes: i64,
    /// Bytes in total; 0 if that is not known.
    pub total_bytes: i64,
    /// Seconds that remain, by the last report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<i64>,
    /// Bytes a second, as the estimate of what remains implies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<i64>,
}

impl LoadProgress {
    /// The load of a status.
    #[must_use]
    pub fn of(loading: &Loading) -> Self {
        let left = loading.total_bytes.saturating_sub(loading.bytes);
        let eta = loading.eta_seconds.filter(|eta| *eta > 0 && left > 0);
        Self {
            bytes: loading.bytes,
            total_bytes: loading.total_bytes,
            eta_seconds: loading.eta_seconds,
            bytes_per_second: eta.map(|eta| left / eta),
        }
    }

    /// The share that is read, if the total is known.
    #[must_use]
    pub fn share(&self) -> Option<f64> {
        (self.total_bytes > 0).then(|| (self.bytes as f64 / self.total_bytes as f64).clamp(0.0, 1.0))
    }

    fn percent(&self) -> String {
        self.share().map_or_else(|| text::bytes(self.bytes), |share| format!("{:.0} %", share * 100.0))
    }

    /// A bar with the figures.
    #[must_use]
    pub fn line(&self) -> String {
        let Some(share) = self.share() else { return format!("{} so far", text::bytes(self.bytes)) };
        let mut line = format!(
            "{} {:3.0} %   {} of {}",
            text::bar(share),
            share * 100.0,
            text::bytes(self.bytes),
            text::bytes(self.total_bytes)
        );
        if let Some(rate) = self.bytes_per_second {
            line.push_str(&format!("   {}/s", text::bytes(rate)));
        }
        if let Some(eta) = self.eta_seconds {
            line.push_str(&format!("   {} left", text::seconds(eta)));
        }
        line
    }
}

impl ModelRow {
    /// A model in short.
    #[must_use]
    pub fn of(model: &InferenceModel, now: Timestamp) -> Self {
        let empty = InferenceModelStatus::default();
        let status = model.status.as_ref().unwrap_or(&empty);
        let created = model.metadata.creation_timestamp.as_ref().map(|time| time.0);
        Self {
            namespace: model.namespace().unwrap_or_default(),
            name: model.name_any(),
            ready_replicas: status.ready_replicas,
            replicas: model.spec.scaling.replicas,
            phase: status.phase.map(|phase| format!("{phase:?}")).unwrap_or_default(),
            revision: status.stable.as_ref().map(|stable| stable.revision.clone()),
            candidate: status
                .candidate
                .as_ref()
                .map(|one| CandidateRow { revision: one.revision.clone(), weight: one.weight }),
            rollout: status.rollout.as_ref().map(|rollout| rollout.phase.clone()),
            loading: status.loading.as_ref().map(LoadProgress::of),
            device: status.device.clone(),
            url: status.url.clone(),
            created: created.map(text::time),
            age: created.map(|created| text::age(created, now)).unwrap_or_default(),
        }
    }
}

/// A table of models.
#[must_use]
pub fn models_table(rows: &[ModelRow], all_namespaces: bool) -> String {
    let mut head =
        vec!["NAME", "READY", "PHASE", "LOADED", "REVISION", "CANDIDATE", "ROLLOUT", "DEVICE", "AGE"];
    if all_namespaces {
        head.insert(0, "NAMESPACE");
    }
    let mut table = Table::new(&head);
    for row in rows {
        let candidate = row.candidate.as_ref().map(|one| format!("{} {} %", one.revision, one.weight));
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let cells = [
            row.name.clone(),
            format!("{}/{}", row.ready_replicas, row.replicas),
            row.phase.clone(),
            row.loading.as_ref().map(LoadProgress::percent).unwrap_or_default(),
            text(&row.revision),
            candidate.unwrap_or_default(),
            text(&row.rollout),
            text(&row.device),
            row.age.clone(),
        ];
        table.row(all_namespaces.then(|| row.namespace.clone()).into_iter().chain(cells));
    }
    if table.is_empty() {
        return "no InferenceModels\n".to_owned();
    }
    table.text()
}

/// A pod of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointRow {
    /// The pod.
    pub pod: String,
    /// Whether its container is ready.
    pub container_ready: bool,
    /// Whether every gateway routes to it.
    pub routable: bool,
    /// The revision that it was made for.
    pub revision: String,
    /// Restarts of its container.
    pub restarts: i32,
    /// Why its container does not run, if Kubernetes says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
    /// Its node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Its address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Whether it is about to end.
    pub ending: bool,
    #[serde(skip)]
    age: String,
}

impl EndpointRow {
    /// A pod in short.
    #[must_use]
    pub fn of(pod: &Pod, now: Timestamp) -> Self {
        let status = pod.status.as_ref();
        let is_true = |kind: &str| {
            let conditions = status.and_then(|status| status.conditions.as_ref()).into_iter().flatten();
            conditions.filter(|one| one.type_ == kind).any(|one| one.status == "True")
        };
        let containers = status.and_then(|status| status.container_statuses.as_ref());
        let container = containers.into_iter().flatten().find(|one| one.name == CONTAINER);
        let waiting = container.and_then(|one| one.state.as_ref()?.waiting.as_ref()?.reason.clone());
        Self {
            pod: pod.name_any(),
            container_ready: is_true("ContainersReady"),
            routable: is_true(ROUTABLE_GATE),
            revision: pod.labels().get(REVISION_LABEL).cloned().unwrap_or_default(),
            restarts: container.map_or(0, |one| one.restart_count),
            waiting,
            node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            address: status.and_then(|status| status.pod_ip.clone()),
            ending: pod.metadata.deletion_timestamp.is_some(),
            age: pod.creation_timestamp().map(|time| text::age(time.0, now)).unwrap_or_default(),
        }
    }

    fn state(&self) -> String {
        match &self.waiting {
            _ if self.ending => "Ending".to_owned(),
            Some(reason) => reason.clone(),
            None if self.routable && self.container_ready => "Serving".to_owned(),
            None if self.container_ready => "Unacknowledged".to_owned(),
            None => "Starting".to_owned(),
        }
    }
}

/// A model with its pods.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelPage {
    /// The model in short.
    #[serde(flatten)]
    pub row: ModelRow,
    /// Its status as it is stored.
    pub status: InferenceModelStatus,
    /// Its pods.
    pub endpoints: Vec<EndpointRow>,
    #[serde(skip)]
    now: Timestamp,
    #[serde(skip)]
    steps: usize,
}

impl ModelPage {
    /// A model with its pods, by name.
    #[must_use]
    pub fn of<'a>(model: &InferenceModel, pods: impl IntoIterator<Item = &'a Pod>, now: Timestamp) -> Self {
        let mut endpoints: Vec<_> = pods.into_iter().map(|pod| EndpointRow::of(pod, now)).collect();
        endpoints.sort_by(|one, other| one.pod.cmp(&other.pod));
        Self {
            row: ModelRow::of(model, now),
            status: model.status.clone().unwrap_or_default(),
            endpoints,
            now,
            steps: model.spec.rollout.steps.len(),
        }
    }

    /// The page as text.
    #[must_use]
    pub fn text(&self) -> String {
        let mut page = format!("{}/{}\n\n", self.row.namespace, self.row.name);
        for (name, value) in self.facts() {
            page.push_str(&format!("{name:<12}{}\n", one_line(&value)));
        }
        page.push('\n');
        page.push_str(&self.conditions());
        page.push('\n');
        page.push_str(&self.pods());
        page
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let (row, status) = (&self.row, &self.status);
        let phase = if row.phase.is_empty() { "not looked at yet" } else { row.phase.as_str() };
        let mut facts = vec![
            ("Phase", phase.to_owned()),
            ("Replicas", format!("{} of {} serve", row.ready_replicas, row.replicas)),
        ];
        let revision = |revision: &str, digest: Option<&String>| match digest {
            Some(digest) => format!("{revision}   sha256 {}", text::short_digest(digest)),
            None => revision.to_owned(),
        };
        let mut add = |name, value: Option<String>| facts.extend(value.map(|value| (name, value)));
        add("URL", row.url.clone());
        add("Device", row.device.clone());
        add("Stable", status.stable.as_ref().map(|one| revision(&one.revision, one.digest.as_ref())));
        add("Previous", status.previous.as_ref().map(|one| revision(&one.revision, one.digest.as_ref())));
        add(
            "Candidate",
            status.candidate.as_ref().map(|one| {
                let shown = revision(&one.revision, one.digest.as_ref());
                format!("{shown}   {} % of the requests", one.weight)
            }),
        );
        add("Rollout", rollout_line(status, self.steps, self.now));
        add("Loading", row.loading.as_ref().map(LoadProgress::line));
        facts
    }

    fn conditions(&self) -> String {
        let mut table = Table::new(&["CONDITION", "STATUS", "REASON", "FOR", "MESSAGE"]);
        for one in &self.status.conditions {
            table.row([
                one.type_.clone(),
                one.status.clone(),
                one.reason.clone(),
                text::age(one.last_transition_time.0, self.now),
                one.message.clone(),
            ]);
        }
        if table.is_empty() {
            "no conditions yet: is the operator running?\n".to_owned()
        } else {
            table.text()
        }
    }

    fn pods(&self) -> String {
        let mut table = Table::new(&["POD", "STATE", "REVISION", "RESTARTS", "NODE", "ADDRESS", "AGE"]);
        for one in &self.endpoints {
            table.row([
                one.pod.clone(),
                one.state(),
                one.revision.clone(),
                one.restarts.to_string(),
                one.node.clone().unwrap_or_default(),
                one.address.clone().unwrap_or_default(),
                one.age.clone(),
            ]);
        }
        if table.is_empty() { "no pods\n".to_owned() } else { table.text() }
    }
}

/// Where a rollout is, in one line; none of a model that was never rolled out.
#[must_use]
pub fn rollout_line(status: &InferenceModelStatus, steps: usize, now: Timestamp) -> Option<String> {
    let rollout = status.rollout.as_ref()?;
    let mut line = rollout.phase.clone();
    // The number of steps stands for "after the last step".
    let step = status.candidate.as_ref().and_then(|one| usize::try_from(one.step).ok());
    if let Some(step) = step.filter(|step| rollout.phase == "Shifting" && *step < steps) {
        line.push_str(&format!(", step {} of {steps}", step + 1));
    }
    line.push_str(&format!(" for {} ({})", text::age(rollout.since.0, now), rollout.placement));
    for (flag, words) in [(rollout.held, "waits for a person"), (rollout.forced, "skips what remains")] {
        if flag {
            line.push_str(&format!("; {words}"));
        }
    }
    match (rollout.reason.as_str(), rollout.message.as_str()) {
        ("", "") => {}
        (reason, "") => line.push_str(&format!(": {reason}")),
        ("", message) => line.push_str(&format!(": {message}")),
        (reason, message) => line.push_str(&format!(": {reason}: {message}")),
    }
    Some(line)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn now() -> Timestamp {
        "2026-12-01T12:00:00Z".parse().unwrap()
    }

    pub(crate) fn shifting() -> InferenceModel {
        serde_yaml::from_str(include_str!("../tests/objects/shifting.yaml")).unwrap()
    }

    fn pods() -> Vec<Pod> {
        let documents = serde_yaml::Deserializer::from_str(include_str!("../tests/objects/pods.yaml"));
        documents.map(|one| serde::Deserialize::deserialize(one).unwrap()).collect()
    }

    #[test]
    fn a_model_in_the_middle_of_a_rollout_has_a_page() {
        insta::assert_snapshot!(ModelPage::of(&shifting(), &pods(), now()).text());
    }

    #[test]
    fn models_are_rows_of_a_table() {
        let new: InferenceModel = serde_yaml::from_str(
            "metadata: {name: fresh, namespace: other}\nspec: {source: {uri: 'hf://a/b'}}",
        )
        .unwrap();
        let rows = [ModelRow::of(&shifting(), now()), ModelRow::of(&new, now())];
        insta::assert_snapshot!(models_table(&rows, true));
        assert_eq!(models_table(&[], false), "no InferenceModels\n");
        assert!(!models_table(&rows, false).contains("NAMESPACE"));
    }

    #[test]
    fn json_has_the_figures_of_the_page() {
        let page = serde_json::to_value(ModelPage::of(&shifting(), &pods(), now())).unwrap();
        assert_eq!(page["name"], "chat");
        assert_eq!(page["candidate"]["weight"], 25);
        assert_eq!(page["loading"]["bytesPerSecond"], 12 << 20);
        assert_eq!(page["endpoints"][0]["routable"], true);
        assert_eq!(page["status"]["rollout"]["reason"], "Inconclusive");
    }

    #[test]
    fn a_load_of_unknown_size_has_no_bar() {
        let loading = Loading { bytes: 3 << 20, ..Loading::default() };
        assert_eq!(LoadProgress::of(&loading).line(), "3.0 MiB so far");
        assert_eq!(LoadProgress::of(&loading).share(), None);
        let done = Loading { bytes: 5, total_bytes: 5, eta_seconds: Some(0) };
        assert_eq!(LoadProgress::of(&done).bytes_per_second, None);
    }

    #[test]
    fn the_state_of_a_pod_says_what_it_waits_for() {
        let states: Vec<_> = pods().iter().map(|pod| EndpointRow::of(pod, now()).state()).collect();
        assert_eq!(states, ["Serving", "Unacknowledged", "ImagePullBackOff", "Ending"]);
    }
}

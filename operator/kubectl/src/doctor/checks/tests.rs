//! Each fault of an installation is named, with what to do.

use super::*;
use kube::CustomResourceExt;
use trustformers_crds::ABTest;

use crate::model::tests::{now, shifting};

fn pods(yaml: &str) -> Vec<Pod> {
    serde_yaml::from_str(yaml).unwrap()
}

fn pod(name: &str, labels: &str, conditions: &str) -> String {
    format!(
        "{{metadata: {{name: {name}, labels: {{{labels}}}}}, spec: {{containers: []}}, status: {{conditions: [{conditions}]}}}}"
    )
}

const READY: &str = "{type: Ready, status: 'True'}";
const LEADS: &str = "serving.trustformers.dev/leader: 'true'";

/// The definition of this version, installed.
fn installed<K: CustomResourceExt>() -> DefinitionFacts {
    DefinitionFacts {
        name: K::crd().name_any(),
        own: Box::new(K::crd()),
        installed: Ok(Some(Box::new(K::crd()))),
    }
}

/// An installation in which everything is right.
fn healthy() -> Facts {
    let mut model = shifting();
    let status = model.status.as_mut().unwrap();
    status.phase = Some(Phase::Ready);
    status.conditions.iter_mut().for_each(|one| one.status = "True".to_owned());
    Facts {
        server: "v1.36.2".to_owned(),
        system_namespace: "trustformers-system".to_owned(),
        definitions: vec![installed::<InferenceModel>(), installed::<ABTest>()],
        lease: Ok(Some(LeaseFacts {
            holder: "op-1_x".to_owned(),
            renewed: "2026-12-01T11:59:58Z".parse().ok(),
        })),
        operators: Ok(pods(&format!("[{}, {}]", pod("op-1", LEADS, READY), pod("op-2", "", READY)))),
        gateways: Ok(pods(&format!("[{}, {}]", pod("gw-1", "", READY), pod("gw-2", "", READY)))),
        gateway_events: Ok(Vec::new()),
        rights: vec![RightFacts {
            verb: "patch",
            resource: "inferencemodels".to_owned(),
            namespace: "team".to_owned(),
            allowed: Ok(true),
        }],
        models: Ok(vec![model]),
        model_pods: Ok(pods(&format!(
            "[{}]",
            pod(
                "chat-a",
                "",
                "{type: ContainersReady, status: 'True', lastTransitionTime: '2026-12-01T11:00:00Z'}, \
                 {type: serving.trustformers.dev/routable, status: 'True'}"
            )
        ))),
        image_volumes: ImageVolumes::Kept,
        now: now(),
    }
}

/// The check of this name.
fn check(facts: &Facts, name: &str) -> Check {
    let found = checks(facts).into_iter().find(|check| check.name == name);
    found.unwrap_or_else(|| panic!("no check {name}"))
}

#[test]
fn a_healthy_installation_passes_every_check() {
    let found = checks(&healthy());
    assert!(found.iter().all(|check| check.level == Level::Ok), "{found:?}");
    assert!(!failed(&found));
    insta::assert_snapshot!(text(&found));
}

#[test]
fn an_installation_with_every_fault_says_what_to_do() {
    let mut facts = healthy();
    let mut old = InferenceModel::crd();
    old.spec.versions.first_mut().unwrap().name = "v2".to_owned();
    facts.definitions[0].installed = Ok(Some(Box::new(old)));
    facts.definitions[1].installed = Ok(None);
    facts.lease =
        Ok(Some(LeaseFacts { holder: "op-1_x".to_owned(), renewed: "2026-12-01T11:50:00Z".parse().ok() }));
    facts.operators = Ok(pods(&format!("[{}]", pod("op-1", "", READY))));
    facts.gateways = Ok(pods(&format!("[{}, {}]", pod("gw-1", "", ""), pod("gw-2", "", READY))));
    facts.rights[0].allowed = Ok(false);
    facts.image_volumes = ImageVolumes::Dropped;
    facts.model_pods = Ok(pods(&format!(
        "[{}]",
        pod(
            "chat-a",
            "",
            "{type: ContainersReady, status: 'True', lastTransitionTime: '2026-12-01T11:00:00Z'}"
        )
    )));
    let model = &mut facts.models.as_mut().unwrap()[0];
    let status = model.status.as_mut().unwrap();
    status.phase = Some(Phase::Degraded);
    status.conditions.push(Condition {
        type_: "Degraded".to_owned(),
        status: "True".to_owned(),
        reason: "ErrImagePull".to_owned(),
        message: "registry.example/models/chat:v2: not found".to_owned(),
        ..status.conditions[0].clone()
    });
    let found = checks(&facts);
    assert!(failed(&found));
    insta::assert_snapshot!(text(&found));
}

#[test]
fn a_pod_may_wait_for_gateways_for_a_moment() {
    let mut facts = healthy();
    let waiting = |since: &str| {
        let condition = format!("{{type: ContainersReady, status: 'True', lastTransitionTime: '{since}'}}");
        Ok(pods(&format!("[{}]", pod("chat-a", "", &condition))))
    };
    facts.model_pods = waiting("2026-12-01T11:59:50Z");
    assert_eq!(check(&facts, "acknowledgements").level, Level::Ok);
    facts.model_pods = waiting("2026-12-01T11:59:00Z");
    let found = check(&facts, "acknowledgements");
    assert_eq!((found.level, found.message.as_str()), (Level::Failed, "pods wait for gateways: chat-a"));
}

#[test]
fn gateways_that_were_left_out_are_named_for_an_hour() {
    let mut facts = healthy();
    let event = |at: &str| GatewayEvent { pod: "gw-1".to_owned(), at: at.parse().ok() };
    facts.gateway_events = Ok(vec![event("2026-12-01T09:00:00Z")]);
    assert_eq!(check(&facts, "acknowledgements").level, Level::Ok);
    facts.gateway_events = Ok(vec![event("2026-12-01T11:30:00Z"), event("2026-12-01T11:40:00Z")]);
    let found = check(&facts, "acknowledgements");
    assert_eq!(found.level, Level::Warning);
    assert!(found.message.ends_with("acknowledged nothing: gw-1"), "{}", found.message);
}

#[test]
fn what_a_person_may_not_read_is_a_warning() {
    let no = || "pods is forbidden".to_owned();
    let facts = Facts {
        operators: Err(no()),
        gateways: Err(no()),
        lease: Err(no()),
        models: Err(no()),
        model_pods: Err(no()),
        gateway_events: Err(no()),
        ..healthy()
    };
    let found = checks(&facts);
    assert!(!failed(&found));
    let unreadable = found.iter().filter(|check| check.message == "pods is forbidden").count();
    assert_eq!(unreadable, 5, "{found:?}");
}

#[test]
fn image_volumes_matter_to_models_that_use_them() {
    let mut facts = Facts { image_volumes: ImageVolumes::Dropped, ..healthy() };
    assert_eq!(check(&facts, "image volumes").level, Level::Failed);
    facts.models.as_mut().unwrap()[0].spec.source.oci = Some(OciAccess::Pull);
    assert_eq!(check(&facts, "image volumes").level, Level::Warning);
    let refused = "spec.volumes[0]: Required value: must specify a volume type".to_owned();
    assert_eq!(ImageVolumes::of_refusal(refused), ImageVolumes::Dropped);
    assert!(matches!(ImageVolumes::of_refusal("forbidden".to_owned()), ImageVolumes::Unknown(_)));
    let dropped = pods("[{metadata: {}, spec: {containers: [], volumes: [{name: model, emptyDir: {}}]}}]");
    assert_eq!(ImageVolumes::of(&dropped[0]), ImageVolumes::Dropped);
    let kept = pods("[{metadata: {}, spec: {containers: [], volumes: [{name: m, image: {reference: a}}]}}]");
    assert_eq!(ImageVolumes::of(&kept[0]), ImageVolumes::Kept);
}

#[test]
fn what_a_model_that_serves_does_without_is_a_warning() {
    let mut facts = healthy();
    let status = facts.models.as_mut().unwrap()[0].status.as_mut().unwrap();
    status.conditions.push(Condition {
        type_: "Autoscaled".to_owned(),
        status: "False".to_owned(),
        reason: "FailedGetResourceMetric".to_owned(),
        message: "no metrics".to_owned(),
        ..status.conditions[0].clone()
    });
    let found = check(&facts, "model team/chat");
    assert_eq!(found.level, Level::Warning);
    assert!(found.message.starts_with("FailedGetResourceMetric for"), "{}", found.message);
}

#[test]
fn a_model_in_the_middle_of_a_rollout_is_a_warning_and_a_stopped_one_is_none() {
    let mut facts = Facts { models: Ok(vec![shifting()]), ..healthy() };
    assert_eq!(check(&facts, "model team/chat").level, Level::Warning);
    facts.models.as_mut().unwrap()[0].status.as_mut().unwrap().phase = Some(Phase::Stopped);
    assert!(checks(&facts).iter().all(|check| check.name != "model team/chat"));
    facts.models.as_mut().unwrap()[0].status = None;
    assert_eq!(check(&facts, "model team/chat").level, Level::Failed);
}

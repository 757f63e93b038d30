//! The policy of a model's route, from `spec.traffic`.

use std::time::Duration;

use trustformers_crds::{
    CircuitBreaker, HashOn, HealthCheck, Hedge, LoadBalancing, ModelRef, Traffic, TrafficShadow,
};
use trustformers_proto::control::v1 as wire;

use crate::duration::{self, DurationError};

/// A duration of `spec.traffic` that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("spec.traffic.{field}: {cause}")]
pub struct TrafficError {
    /// Field below `spec.traffic`.
    pub field: &'static str,
    /// What is wrong with it.
    pub cause: DurationError,
}

/// A rule of `spec.traffic` that its fields break together. The schema refuses most of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TrafficConflict {
    /// An attempt may take longer than the request.
    #[error(
        "spec.traffic.attemptTimeout is longer than spec.traffic.timeout, which ends the request first; make it shorter"
    )]
    AttemptTimeout,
    /// A pod is checked again before its check has failed.
    #[error("spec.traffic.healthCheck.timeout is longer than its interval; make it shorter")]
    CheckTimeout,
    /// A request ends before it may be sent to a second pod.
    #[error(
        "spec.traffic.hedge.delay is not shorter than spec.traffic.timeout, which ends the request first; make it shorter"
    )]
    HedgeDelay,
    /// A model would answer its own requests again.
    #[error(
        "spec.traffic.shadow.modelRef.name: is this model; name another one, or set modelRef.revision to one of its revisions, such as a candidate"
    )]
    ShadowOfItself,
}

/// The policy that gateways get.
///
/// # Errors
/// Names the field that cannot be read.
pub fn policy(traffic: &Traffic) -> Result<wire::Policy, TrafficError> {
    let Traffic {
        timeout,
        attempt_timeout,
        retries,
        retry_delay,
        retry_budget,
        // Not the gateway's: the pods'.
        drain_timeout: _,
        // Not of the policy: of the route.
        shadow: _,
        load_balancing,
        hash_on,
        slow_start,
        hold,
        health_check,
        circuit_breaker,
        hedge,
        accept_tenant,
        accept_priority,
    } = traffic;
    let optional = |field, text: &Option<String>| text.as_deref().map_or(Ok(0), |text| ms(field, text));
    Ok(wire::Policy {
        first_byte_timeout_ms: ms("timeout", timeout)?,
        retries: *retries,
        hold_ms: hold.as_ref().map_or(Ok(0), |hold| ms("hold.time", &hold.time))?,
        accept_tenant: *accept_tenant,
        accept_priority: *accept_priority,
        load_balancing: Some(wire::LoadBalancing {
            by: balance_by(*load_balancing).into(),
            slow_start_ms: optional("slowStart", slow_start)?,
            hash_on: hash_on.as_ref().map_or(wire::HashOn::PromptPrefix, |_| wire::HashOn::Header).into(),
            hash_header: hash_on.as_ref().map(|HashOn { header }| header.clone()).unwrap_or_default(),
        }),
        health_check: health_check.as_ref().map(check).transpose()?,
        circuit_breaker: circuit_breaker.as_ref().map(breaker).transpose()?,
        retry: Some(wire::Retry {
            base_delay_ms: ms("retryDelay", retry_delay)?,
            budget_percent: retry_budget.percent,
            min_retries: retry_budget.min_retries,
            window_ms: ms("retryBudget.window", &retry_budget.window)?,
        }),
        attempt_timeout_ms: optional("attemptTimeout", attempt_timeout)?,
        hold_requests: hold.as_ref().map_or(0, |hold| hold.max_requests),
        hedge: hedge.as_ref().map(hedged).transpose()?,
    })
}

/// The shadow of a model's route.
#[must_use]
pub fn shadow(namespace: &str, shadow: &TrafficShadow) -> wire::Shadow {
    let TrafficShadow { model_ref, percent, compare } = shadow;
    wire::Shadow { percent: *percent, discard: !compare, ..shadowed_by(namespace, model_ref) }
}

/// A shadow that is a model of the namespace, or one of its revisions, without a share.
#[must_use]
pub fn shadowed_by(namespace: &str, model: &ModelRef) -> wire::Shadow {
    let ModelRef { name, revision } = model;
    wire::Shadow {
        route: format!("{namespace}/{name}"),
        revision: revision.clone().unwrap_or_default(),
        ..wire::Shadow::default()
    }
}

/// Whether a model's shadow is another one than the model.
///
/// # Errors
/// Names the field to change.
pub fn check_shadow(model: &str, traffic: &Traffic) -> Result<(), TrafficConflict> {
    let is_itself =
        |shadow: &&TrafficShadow| shadow.model_ref.name == model && shadow.model_ref.revision.is_none();
    traffic.shadow.as_ref().filter(is_itself).map_or(Ok(()), |_| Err(TrafficConflict::ShadowOfItself))
}

/// Whether the fields of a policy fit together.
///
/// # Errors
/// Names the field to change.
pub fn check_conflicts(policy: &wire::Policy) -> Result<(), TrafficConflict> {
    if policy.first_byte_timeout_ms > 0 && policy.attempt_timeout_ms > policy.first_byte_timeout_ms {
        return Err(TrafficConflict::AttemptTimeout);
    }
    let hedge_ms = policy.hedge.as_ref().map_or(0, |hedge| hedge.delay_ms);
    if hedge_ms > 0 && policy.first_byte_timeout_ms > 0 && hedge_ms >= policy.first_byte_timeout_ms {
        return Err(TrafficConflict::HedgeDelay);
    }
    match &policy.health_check {
        Some(check) if check.timeout_ms > check.interval_ms => Err(TrafficConflict::CheckTimeout),
        _ => Ok(()),
    }
}

fn balance_by(load_balancing: LoadBalancing) -> wire::BalanceBy {
    match load_balancing {
        LoadBalancing::LeastRequests => wire::BalanceBy::LeastRequests,
        LoadBalancing::RoundRobin => wire::BalanceBy::RoundRobin,
        LoadBalancing::Weighted => wire::BalanceBy::Weighted,
        LoadBalancing::LatencyEwma => wire::BalanceBy::LatencyEwma,
        LoadBalancing::ConsistentHash => wire::BalanceBy::ConsistentHash,
    }
}

fn check(check: &HealthCheck) -> Result<wire::HealthCheck, TrafficError> {
    let HealthCheck { interval, timeout, down_after, up_after } = check;
    Ok(wire::HealthCheck {
        interval_ms: ms("healthCheck.interval", interval)?,
        timeout_ms: ms("healthCheck.timeout", timeout)?,
        down_after: *down_after,
        up_after: *up_after,
    })
}

fn hedged(hedge: &Hedge) -> Result<wire::Hedge, TrafficError> {
    let Hedge { delay, budget_percent } = hedge;
    let delay_ms = delay.as_deref().map_or(Ok(0), |delay| ms("hedge.delay", delay))?;
    Ok(wire::Hedge { delay_ms, budget_percent: *budget_percent })
}

fn breaker(breaker: &CircuitBreaker) -> Result<wire::CircuitBreaker, TrafficError> {
    let CircuitBreaker { consecutive_failures, failure_percent, min_attempts, window, open } = breaker;
    Ok(wire::CircuitBreaker {
        consecutive_failures: *consecutive_failures,
        failure_percent: *failure_percent,
        min_attempts: *min_attempts,
        window_ms: ms("circuitBreaker.window", window)?,
        open_ms: ms("circuitBreaker.open", open)?,
    })
}

fn ms(field: &'static str, text: &str) -> Result<u64, TrafficError> {
    let parsed: Duration = duration::parse(text).map_err(|cause| TrafficError { field, cause })?;
    // At most a week.
    Ok(u64::try_from(parsed.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic(yaml: &str) -> Traffic {
        serde_yaml::from_str(yaml).unwrap()
    }

    #[test]
    fn every_field_reaches_the_policy() {
        let written = traffic(
            "{timeout: 1m, attemptTimeout: 15s, retries: 3, retryDelay: 50ms, \
             retryBudget: {percent: 10, minRetries: 5, window: 20s}, loadBalancing: ConsistentHash, \
             hashOn: {header: x-session-id}, slowStart: 30s, hold: {time: 10s, maxRequests: 64}, \
             healthCheck: {}, circuitBreaker: {failurePercent: 50}, \
             hedge: {delay: 80ms}, acceptTenant: true, acceptPriority: true}",
        );
        let expected = wire::Policy {
            first_byte_timeout_ms: 60_000,
            retries: 3,
            hold_ms: 10_000,
            accept_tenant: true,
            accept_priority: true,
            load_balancing: Some(wire::LoadBalancing {
                by: wire::BalanceBy::ConsistentHash.into(),
                slow_start_ms: 30_000,
                hash_on: wire::HashOn::Header.into(),
                hash_header: "x-session-id".to_owned(),
            }),
            health_check: Some(wire::HealthCheck {
                interval_ms: 30_000,
                timeout_ms: 2000,
                down_after: 3,
                up_after: 2,
            }),
            circuit_breaker: Some(wire::CircuitBreaker {
                consecutive_failures: 5,
                failure_percent: 50,
                min_attempts: 20,
                window_ms: 10_000,
                open_ms: 60_000,
            }),
            retry: Some(wire::Retry {
                base_delay_ms: 50,
                budget_percent: 10,
                min_retries: 5,
                window_ms: 20_000,
            }),
            attempt_timeout_ms: 15_000,
            hold_requests: 64,
            hedge: Some(wire::Hedge { delay_ms: 80, budget_percent: 5 }),
        };
        assert_eq!(policy(&written).unwrap(), expected);
        assert_eq!(check_conflicts(&expected), Ok(()));
    }

    #[test]
    fn what_is_not_asked_for_is_off() {
        let policy = policy(&Traffic::default()).unwrap();
        assert_eq!((policy.health_check, policy.circuit_breaker, policy.hedge), (None, None, None));
        assert_eq!((policy.hold_ms, policy.attempt_timeout_ms), (0, 0));
    }

    #[test]
    fn a_shadow_is_a_model_of_the_namespace_or_one_of_its_revisions() {
        let of = |yaml: &str| {
            let traffic = traffic(yaml);
            (shadow("team", traffic.shadow.as_ref().unwrap()), check_shadow("chat", &traffic))
        };
        let wire = |route: &str, revision: &str, percent, discard| wire::Shadow {
            route: route.to_owned(),
            revision: revision.to_owned(),
            percent,
            discard,
            variant: String::new(),
        };
        assert_eq!(
            of("{shadow: {modelRef: {name: next}, percent: 10}}"),
            (wire("team/next", "", 10, false), Ok(()))
        );
        assert_eq!(
            of("{shadow: {modelRef: {name: chat, revision: r2}, percent: 1, compare: false}}"),
            (wire("team/chat", "r2", 1, true), Ok(()))
        );
        let itself = of("{shadow: {modelRef: {name: chat}, percent: 1}}").1;
        assert_eq!(itself, Err(TrafficConflict::ShadowOfItself));
        assert_eq!(check_shadow("chat", &Traffic::default()), Ok(()));
    }

    #[test]
    fn mistakes_are_named() {
        let late = policy(&traffic("{circuitBreaker: {open: 900h}}")).unwrap_err();
        assert!(late.to_string().starts_with("spec.traffic.circuitBreaker.open: "), "{late}");
        for (yaml, expected) in [
            ("{timeout: 1m, attemptTimeout: 90s}", TrafficConflict::AttemptTimeout),
            ("{healthCheck: {interval: 1s, timeout: 2s}}", TrafficConflict::CheckTimeout),
            ("{timeout: 1s, hedge: {delay: 1s}}", TrafficConflict::HedgeDelay),
        ] {
            assert_eq!(check_conflicts(&policy(&traffic(yaml)).unwrap()), Err(expected), "{yaml}");
        }
    }
}

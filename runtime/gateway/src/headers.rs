//! What a proxy does to headers: it drops those of one hop, adds the address that it forwards for, and
//! decides what of the rest says who the caller is.
//!
//! A caller could claim to be any tenant and of any priority class. So its own headers count only where its
//! route allows that. Where a proxy in front of this gateway knows the caller, it says so in headers that the
//! gateway is told to trust; that proxy has to remove them from what its callers send.

use std::net::IpAddr;

use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderName, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE,
    TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, HeaderValue};
use trustformers_api::answer_end::REPORT_HEADER;
use trustformers_api::priority::{self, PRIORITY_HEADER};
use trustformers_api::revision::{REVISION_HEADER, ROUTED_HEADER};
use trustformers_api::tenant::TENANT_HEADER;
use trustformers_proto::MODEL_HEADER;

use crate::call::{Caller, CallerRules};

/// Identifies a request in all logs.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The addresses that a request came through, the original caller's first.
pub(crate) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Longer ids are replaced, because every log line repeats them.
const REQUEST_ID_MAX_BYTES: usize = 128;

/// Headers that belong to one connection.
const ONE_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("http2-settings"),
];

/// Headers in which a proxy in front of this gateway says who a caller is. Without one, nothing is trusted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TrustedHeaders {
    /// The tenant.
    pub(crate) tenant: Option<HeaderName>,
    /// The priority class.
    pub(crate) priority: Option<HeaderName>,
}

/// Longer values name nobody: pods refuse a tenant of more bytes, and each held request has a copy.
const MAX_VALUE_BYTES: usize = 256;

impl TrustedHeaders {
    /// Who sends a request with these headers on a route with these rules.
    pub(crate) fn caller(&self, headers: &HeaderMap, address: IpAddr, rules: CallerRules) -> Caller {
        let value = |name: Option<&HeaderName>| {
            let value = headers.get(name?)?;
            let text = std::str::from_utf8(value.as_bytes()).ok()?;
            (1..=MAX_VALUE_BYTES).contains(&text.len()).then(|| text.to_owned())
        };
        let own = |allowed: bool, name: &'static str| allowed.then(|| HeaderName::from_static(name));
        let own_tenant = own(rules.own_tenant, TENANT_HEADER);
        let own_priority = own(rules.own_priority, PRIORITY_HEADER);
        let class = value(self.priority.as_ref()).or_else(|| value(own_priority.as_ref()));
        Caller {
            address,
            tenant: value(self.tenant.as_ref()).or_else(|| value(own_tenant.as_ref())),
            priority: class.and_then(|class| {
                let named = HeaderMap::from_iter([(
                    HeaderName::from_static(PRIORITY_HEADER),
                    HeaderValue::from_str(&class).ok()?,
                )]);
                priority::of_headers(&named).ok().flatten()
            }),
        }
    }

    /// Replaces what the headers say of the caller by what the gateway believes. A priority class that the
    /// caller may choose stays as it is written, so that the pod can refuse an unknown one by name.
    fn replace(&self, headers: &mut HeaderMap, caller: &Caller, own_priority: bool) {
        let named = [&self.tenant, &self.priority];
        for name in named.into_iter().flatten() {
            headers.remove(name);
        }
        headers.remove(TENANT_HEADER);
        let tenant =
            caller.tenant.as_deref().and_then(|tenant| HeaderValue::from_bytes(tenant.as_bytes()).ok());
        if let Some(tenant) = tenant {
            headers.insert(TENANT_HEADER, tenant);
        }
        if let Some(priority) = caller.priority {
            headers.insert(PRIORITY_HEADER, HeaderValue::from_static(priority.as_str()));
        } else if !own_priority {
            headers.remove(PRIORITY_HEADER);
        }
    }
}

/// How a request's headers are forwarded.
#[derive(Debug)]
pub(crate) struct Forwarding<'a> {
    /// Who sends it.
    pub(crate) caller: &'a Caller,
    /// The headers that are trusted.
    pub(crate) trusted: &'a TrustedHeaders,
    /// What of the caller's own headers counts.
    pub(crate) rules: CallerRules,
    /// The request's id.
    pub(crate) request_id: HeaderValue,
}

/// The pod's only model is meant, whatever name the request has.
pub(crate) const ONLY_MODEL: HeaderValue = HeaderValue::from_static("1");

/// Says which model is meant, where the route has the name of a test and not that of the model.
pub(crate) fn name_routed(headers: &mut HeaderMap, routed: Option<&HeaderValue>) {
    if let Some(routed) = routed {
        headers.insert(HeaderName::from_static(ROUTED_HEADER), routed.clone());
    }
}

/// Names the revision that must answer, unless the caller names one itself.
pub(crate) fn name_revision(headers: &mut HeaderMap, revision: Option<&str>) {
    let value = revision.and_then(|revision| HeaderValue::from_str(revision).ok());
    if let Some(value) = value {
        headers.entry(HeaderName::from_static(REVISION_HEADER)).or_insert(value);
    }
}

/// Removes the headers of one hop, including those that `Connection` names.
pub(crate) fn strip_one_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&ONE_HOP) {
        headers.remove(name);
    }
}

/// Converts the headers of a caller to those that a pod gets.
pub(crate) fn forwarded(mut headers: HeaderMap, forwarding: Forwarding<'_>) -> HeaderMap {
    let Forwarding { caller, trusted, rules, request_id } = forwarding;
    // gRPC requires `te: trailers` on every hop.
    let trailers = headers.get(TE).is_some_and(|value| value == "trailers");
    strip_one_hop(&mut headers);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    // HTTP/2 sends the host as the authority, the length is that of the body that is sent, and `100 Continue`
    // was sent when the body was read.
    for name in [HOST, CONTENT_LENGTH, EXPECT] {
        headers.remove(name);
    }
    for name in [ROUTED_HEADER, MODEL_HEADER] {
        headers.remove(name);
    }
    let mut chain = Vec::new();
    for earlier in headers.get_all(FORWARDED_FOR) {
        chain.extend_from_slice(earlier.as_bytes());
        chain.extend_from_slice(b", ");
    }
    // An IPv4 caller on a dual-stack listener is an IPv4 caller.
    chain.extend_from_slice(caller.address.to_canonical().to_string().as_bytes());
    if let Ok(chain) = HeaderValue::from_bytes(&chain) {
        headers.insert(FORWARDED_FOR, chain);
    }
    trusted.replace(&mut headers, caller, rules.own_priority);
    headers.insert(REQUEST_ID, request_id);
    headers.insert(REPORT_HEADER, HeaderValue::from_static("1"));
    headers
}

/// The caller's id for the request, or a new one.
pub(crate) fn request_id(headers: &HeaderMap) -> HeaderValue {
    let given = headers.get(REQUEST_ID).filter(|id| {
        !id.is_empty() && id.len() <= REQUEST_ID_MAX_BYTES && id.as_bytes().iter().all(u8::is_ascii_graphic)
    });
    given.cloned().unwrap_or_else(|| {
        let mut buffer = uuid::Uuid::encode_buffer();
        // An id has to be unique, not secret, so no system call is needed.
        let id = uuid::Builder::from_random_bytes(fastrand::u128(..).to_be_bytes()).into_uuid();
        let text = id.hyphenated().encode_lower(&mut buffer);
        // Hexadecimal digits and hyphens are always a valid value.
        HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static("-"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    fn a_proxys_headers() -> TrustedHeaders {
        TrustedHeaders {
            tenant: Some(HeaderName::from_static("x-tenant")),
            priority: Some(HeaderName::from_static("x-class")),
        }
    }

    fn address() -> IpAddr {
        [192, 0, 2, 7].into()
    }

    fn sent(headers: HeaderMap, trusted: &TrustedHeaders, rules: CallerRules) -> HeaderMap {
        let caller = trusted.caller(&headers, address(), rules);
        let request_id = HeaderValue::from_static("id");
        forwarded(headers, Forwarding { caller: &caller, trusted, rules, request_id })
    }

    #[test]
    fn a_callers_own_words_count_only_where_they_are_allowed() {
        let own = || map(&[(TENANT_HEADER, "mine"), (PRIORITY_HEADER, "high"), ("x-user-id", "u7")]);
        let nothing = TrustedHeaders::default();
        let strict = CallerRules::default();
        let caller = nothing.caller(&own(), address(), strict);
        let nobody = Caller { address: address(), tenant: None, priority: None };
        assert_eq!(caller, nobody);
        let headers = sent(own(), &nothing, strict);
        assert!(!headers.contains_key(TENANT_HEADER) && !headers.contains_key(PRIORITY_HEADER));
        let open = CallerRules { own_tenant: true, own_priority: true };
        let caller = nothing.caller(&own(), address(), open);
        let class = Some(trustformers_api::Priority::High);
        assert_eq!((caller.tenant.as_deref(), caller.priority), (Some("mine"), class));
        let headers = sent(own(), &nothing, open);
        assert_eq!(
            (&headers[TENANT_HEADER], &headers[PRIORITY_HEADER]),
            (&"mine".parse().unwrap(), &"high".parse().unwrap())
        );
        // An unknown class is for the pod to refuse.
        let headers = sent(map(&[(PRIORITY_HEADER, "urgent")]), &nothing, open);
        assert_eq!(headers[PRIORITY_HEADER], "urgent");
    }

    #[test]
    fn a_trusted_proxy_overrides_the_caller_and_its_headers_end_here() {
        let both = map(&[
            (TENANT_HEADER, "claimed"),
            (PRIORITY_HEADER, "high"),
            ("x-tenant", "team-1"),
            ("x-class", "low"),
        ]);
        let open = CallerRules { own_tenant: true, own_priority: true };
        for rules in [CallerRules::default(), open] {
            let caller = a_proxys_headers().caller(&both, address(), rules);
            assert_eq!(caller.priority, Some(trustformers_api::Priority::Low));
            let headers = sent(both.clone(), &a_proxys_headers(), rules);
            assert_eq!(headers[TENANT_HEADER], "team-1");
            assert_eq!(headers[PRIORITY_HEADER], "low");
            assert!(!headers.contains_key("x-tenant") && !headers.contains_key("x-class"));
        }
        let long = "t".repeat(MAX_VALUE_BYTES + 1);
        let headers = HeaderMap::from_iter([(HeaderName::from_static("x-tenant"), long.parse().unwrap())]);
        assert_eq!(a_proxys_headers().caller(&headers, address(), open).tenant, None);
    }

    #[test]
    fn headers_of_one_hop_do_not_reach_the_pod() {
        let caller = map(&[
            ("connection", "keep-alive, x-private"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("http2-settings", "AAMA"),
            ("te", "trailers"),
            ("host", "example.org"),
            ("content-length", "12"),
            ("expect", "100-continue"),
            ("x-private", "1"),
            ("authorization", "Bearer t"),
            ("x-user-id", "u"),
            ("x-trustformers-model", "m"),
            ("x-trustformers-priority", "low"),
            ("x-gateway-inference-fairness-id", "team-1"),
        ]);
        let sent = sent(caller, &TrustedHeaders::default(), CallerRules::default());
        let mut names: Vec<&str> = sent.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "authorization",
                "te",
                "x-forwarded-for",
                "x-request-id",
                "x-trustformers-report-end",
                "x-user-id"
            ]
        );
        assert_eq!(sent["te"], "trailers");
        assert_eq!(sent[FORWARDED_FOR], "192.0.2.7");
    }

    #[test]
    fn a_pod_with_two_revisions_is_asked_for_one_and_the_callers_word_counts_first() {
        let named = |before: &[(&'static str, &'static str)], revision| {
            let mut headers = map(before);
            name_revision(&mut headers, revision);
            headers.get(REVISION_HEADER).map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(named(&[], Some("r2")).as_deref(), Some("r2"));
        assert_eq!(named(&[(REVISION_HEADER, "r1")], Some("r2")).as_deref(), Some("r1"));
        assert_eq!(named(&[], None), None);
    }

    #[test]
    fn the_caller_is_added_to_x_forwarded_for() {
        let caller = map(&[("x-forwarded-for", "198.51.100.1"), ("x-forwarded-for", "198.51.100.2")]);
        let trusted = TrustedHeaders::default();
        let mapped: IpAddr = "::ffff:192.0.2.7".parse().unwrap();
        let from = trusted.caller(&caller, mapped, CallerRules::default());
        let request_id = HeaderValue::from_static("id");
        let rules = CallerRules::default();
        let sent = forwarded(caller, Forwarding { caller: &from, trusted: &trusted, rules, request_id });
        assert_eq!(sent[FORWARDED_FOR], "198.51.100.1, 198.51.100.2, 192.0.2.7");
        assert_eq!(sent.get_all(FORWARDED_FOR).iter().count(), 1);
    }

    #[test]
    fn a_valid_request_id_stays_and_others_are_replaced() {
        assert_eq!(request_id(&map(&[("x-request-id", "abc-1")])), "abc-1");
        let made = request_id(&map(&[("x-request-id", "two words")]));
        assert_eq!(made.len(), 36);
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}

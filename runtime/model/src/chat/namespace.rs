//! The `namespace` of templates: the only value that a template can change.
//!
//! Through a namespace a loop could nest values without an end, or make a value contain itself. Printing,
//! comparing or dropping such a value would overflow the stack, so values are checked when they are set.

use minijinja::value::{Enumerator, Object, ValueKind, ValueOrKwargs};
use minijinja::{Error, ErrorKind, State, Value};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The method that sets a value.
pub(super) const SET: &str = "__set__";

/// Deepest nesting of a value. JSON of a request nests at most 128 deep; a template may add as much.
pub(super) const MAX_DEPTH: usize = 256;

/// Bound on the values within one value, counted along every path. A conversation of ten thousand messages
/// has some 100,000.
const MAX_VALUES: usize = 1_000_000;

/// The object that `namespace(...)` returns.
#[derive(Debug, Default)]
pub(super) struct Namespace {
    values: Mutex<BTreeMap<Arc<str>, Value>>,
}

impl Namespace {
    /// The function of that name: a map or keyword arguments give the first values.
    pub(super) fn create(first: Option<ValueOrKwargs>) -> Result<Value, Error> {
        let namespace = Self::default();
        if let Some(first) = first.map(ValueOrKwargs::into_value) {
            for name in first.try_iter()? {
                let value = first.get_item(&name)?;
                namespace.set(&name, value)?;
            }
        }
        Ok(Value::from_object(namespace))
    }

    fn set(&self, name: &Value, value: Value) -> Result<(), Error> {
        let Some(name) = name.as_str() else { return Err(invalid("a namespace has names as its keys")) };
        // An iterator could be read only once.
        let value = match value.kind() {
            ValueKind::Iterable => Value::from(value.try_iter()?.collect::<Vec<Value>>()),
            _ => value,
        };
        let mut left = MAX_VALUES;
        check(&value, MAX_DEPTH, &mut left)?;
        self.values.lock().unwrap_or_else(PoisonError::into_inner).insert(Arc::from(name), value);
        Ok(())
    }
}

impl Object for Namespace {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner).get(key.as_str()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        Enumerator::Values(values.keys().cloned().map(Value::from).collect())
    }

    fn call_method(
        self: &Arc<Self>,
        state: &mut State<'_, '_>,
        method: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        match (method, args) {
            (SET, [name, value]) => self.set(name, value.clone()).map(|()| Value::UNDEFINED),
            _ => match self.get_value(&Value::from(method)) {
                Some(value) => value.call(state, args),
                None => Err(Error::from(ErrorKind::UnknownMethod)),
            },
        }
    }
}

fn invalid(why: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, why)
}

/// Refuses a value that nests deeper than `depth`, holds more values than are `left`, or holds a namespace or
/// a macro, which may in turn hold the value.
pub(super) fn check(value: &Value, depth: usize, left: &mut usize) -> Result<(), Error> {
    if value.downcast_object_ref::<Namespace>().is_some() || value.kind() == ValueKind::Plain {
        return Err(invalid("only plain data can be used here, not a namespace, macro or function"));
    }
    let Some(rest) = left.checked_sub(1) else { return Err(invalid("the value is too large")) };
    *left = rest;
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
        return Ok(());
    }
    let Some(depth) = depth.checked_sub(1) else { return Err(invalid("the value nests too deep")) };
    for item in value.try_iter()? {
        if value.kind() == ValueKind::Map {
            check(&value.get_item(&item)?, depth, left)?;
        }
        check(&item, depth, left)?;
    }
    Ok(())
}

//! Vector clocks (Fidge; Mattern): what each actor of a block knows to have happened.
//!
//! Inside one block a clock is a dense vector with an entry for each of its [`super::actors::Actors`]. Knowledge about
//! other blocks is rare (it needs a global atomic), so it is kept beside the vector in a shared, usually empty map.

use std::collections::BTreeMap;
use std::rc::Rc;

/// What is known about the actors of other blocks, by block serial number.
#[derive(Clone, Default)]
pub(crate) struct Foreign(Option<Rc<BTreeMap<u32, Vec<u32>>>>);

impl Foreign {
    /// The last known clock of actor `id` of block `serial`; 0 if nothing is known.
    pub fn known(&self, serial: u32, id: usize) -> u32 {
        self.0
            .as_ref()
            .and_then(|map| map.get(&serial))
            .and_then(|clock| clock.get(id))
            .copied()
            .unwrap_or(0)
    }

    /// Adds everything `other` knows.
    pub fn join(&mut self, other: &Foreign) {
        let Some(theirs) = &other.0 else { return };
        match &self.0 {
            Some(mine) if Rc::ptr_eq(mine, theirs) => {}
            None => self.0 = Some(theirs.clone()),
            Some(_) => theirs
                .iter()
                .for_each(|(&serial, clock)| self.join_block(serial, clock)),
        }
    }

    /// Adds the knowledge `clock` about block `serial`.
    pub fn join_block(&mut self, serial: u32, clock: &[u32]) {
        let map = Rc::make_mut(self.0.get_or_insert_default());
        let mine = map.entry(serial).or_insert_with(|| vec![0; clock.len()]);
        max_into(mine, clock);
    }

    /// The part about block `serial`, if any.
    pub fn block(&self, serial: u32) -> Option<&[u32]> {
        self.0
            .as_ref()
            .and_then(|map| map.get(&serial))
            .map(Vec::as_slice)
    }
}

/// One actor's knowledge: of its own block (`local`, one entry an actor) and of others.
#[derive(Default)]
pub(crate) struct Clock {
    pub local: Vec<u32>,
    /// The part of `local` that a proxy fence has carried over to the async proxy; empty before the first.
    pub proxied: Vec<u32>,
    pub foreign: Foreign,
}

impl Clone for Clock {
    fn clone(&self) -> Self {
        Clock {
            local: self.local.clone(),
            proxied: self.proxied.clone(),
            foreign: self.foreign.clone(),
        }
    }

    fn clone_from(&mut self, source: &Self) {
        self.local.clone_from(&source.local);
        self.proxied.clone_from(&source.proxied);
        self.foreign.clone_from(&source.foreign);
    }
}

impl Clock {
    /// A clock over `actors` that knows nothing.
    pub fn new(actors: usize) -> Self {
        Clock {
            local: vec![0; actors],
            ..Clock::default()
        }
    }

    /// Adds everything `other`, a clock of the same block, knows.
    pub fn join(&mut self, other: &Clock) {
        max_into(&mut self.local, &other.local);
        if self.proxied.is_empty() {
            self.proxied.clone_from(&other.proxied);
        } else {
            max_into(&mut self.proxied, &other.proxied);
        }
        self.foreign.join(&other.foreign);
    }

    /// Adds what the entries of a clock of the same block know.
    pub fn join_local(&mut self, entries: &[u32]) {
        max_into(&mut self.local, entries);
    }

    /// fence.proxy.async: what is known now is known to the async proxy too.
    pub fn fence_proxy(&mut self) {
        self.proxied.clone_from(&self.local);
    }
}

/// `into[i] = max(into[i], from[i])`.
fn max_into(into: &mut [u32], from: &[u32]) {
    for (mine, theirs) in into.iter_mut().zip(from) {
        *mine = (*mine).max(*theirs);
    }
}

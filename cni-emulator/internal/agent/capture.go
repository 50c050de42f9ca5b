package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"sync"

	"ambient-emulator/cni-emulator/internal/control"
	"ambient-emulator/cni-emulator/internal/redirect"
	"ambient-emulator/internal/netns"
)

// errRules marks what a deleted pod keeps.
var errRules = errors.New("its rules are left in the pod, which stays closed; `cni-emulator rules remove --netns PATH` takes them out")

// captured tells whether the pod's rules are ours to take out.
func (p *pod) captured() bool { return p.Capture != "" && redirect.Mode(p.Capture) != redirect.None }

// captureOf tells how a pod is to be captured: as was said of it, or else as the
// agent does. It judges the words.
func (a *Agent) captureOf(id control.PodID) (redirect.Config, error) {
	c := a.cfg.Capture
	if c.Mode == "" {
		c.Mode = redirect.None
	}
	var err error
	if id.Capture != "" {
		if c.Mode, err = redirect.ParseMode(id.Capture); err != nil {
			return c, err
		}
	}
	if id.DNSCapture != "" {
		if c.DNS, err = strconv.ParseBool(id.DNSCapture); err != nil {
			return c, fmt.Errorf("DNS capture %q: it is true or false", id.DNSCapture)
		}
	}
	return c, nil
}

// capture puts the pod's rules in place before anybody hears of the pod: a
// namespace that is not captured is not handed over. It writes into id how the
// pod is captured now, whatever the agent will do by itself after a restart, and
// returns how many open connections of the pod do not survive it. The caller holds
// the namespace's rules.
func (a *Agent) capture(id *control.PodID, ns *netns.NS, watched bool) (reset int, err error) {
	a.mu.Lock()
	p, other := a.pods[id.UID], a.byNetNS[ns.ID()]
	taken := other != nil && other.UID != id.UID
	was := other != nil && other.captured()
	if p != nil && watched && !p.watched && p.Path == id.Path {
		id.Capture, id.DNSCapture = p.Capture, p.DNSCapture // what a person has said stands
	}
	a.mu.Unlock()
	if taken {
		return 0, nil // Add says so, and nothing is touched
	}

	c, err := a.captureOf(*id)
	switch {
	case err != nil:
		return 0, err
	case c.Mode != redirect.None:
		report, err := redirect.Install(ns, c)
		if errors.Is(err, redirect.ErrLoDown) {
			err = fmt.Errorf("%w: %s", err, redirect.LoUp(id.Path))
		}
		if err != nil {
			return 0, err
		}
		if reset = report.Open; reset > 0 {
			a.log.Warn("the pod's open connections will be reset at their next packet: it is captured while it runs", "pod", id.Namespace+"/"+id.Name, "uid", id.UID, "connections", reset)
		}
		id.DNSCapture = strconv.FormatBool(c.DNS)
	case was:
		if err := redirect.Remove(ns); err != nil {
			return 0, err
		}
		fallthrough
	default:
		id.DNSCapture = ""
	}
	if c.Mode != redirect.None || id.Capture != "" {
		id.Capture = string(c.Mode)
	}
	return reset, nil
}

// intend writes down that a namespace is about to get rules: they shall not outlive an
// agent that dies before it has written the pod down, because nobody would know of them.
// done takes that back; without an error it is not nil.
//
// A watched namespace needs none of it: the next agent finds it where it was.
func (a *Agent) intend(ctx context.Context, id control.PodID, h *handle) (done func(), err error) {
	c, wordsErr := a.captureOf(id)
	if cmp.Or(wordsErr, checkWords(id), a.checkNetNS(h.ns.ID())) != nil || c.Mode == redirect.None {
		return func() {}, nil // there will be no rules
	}
	a.mu.Lock()
	if a.byNetNS[h.ns.ID()] != nil {
		a.mu.Unlock()
		return func() {}, nil // it is known
	}
	a.arriving[h.hold()] = id
	a.changed()
	a.mu.Unlock()
	done = func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.arriving, h)
		a.changed()
		h.release()
	}
	if err := a.onDisk(ctx); errors.Is(err, ErrStopping) {
		done()
		return nil, err
	}
	return done, nil // if it could not be written, the verb will say so
}

// uncapture takes the rules out of a namespace that is no pod's any more, once the
// n ztunnels have answered the delete: until then they may serve it. A ztunnel
// that says no may go on; then the rules stay, and the pod is closed rather than
// open. It takes h over, and hands each outcome on. h is nil if the namespace was
// not at hand; then it is looked for where was says.
func (a *Agent) uncapture(h *handle, was record, n int, answers <-chan Outcome, outcomes chan<- Outcome, rules chan<- error) {
	nacked := false
	for range n {
		o := <-answers
		nacked = nacked || o.Nack != ""
		outcomes <- o
	}
	var err error
	switch {
	case nacked:
		err = errRules
	case h == nil:
		err = a.releaseAgain(was)
	default:
		if err = a.removeRules(h.ns); err != nil {
			err = fmt.Errorf("%w: %w", errRules, err)
		}
	}
	if err != nil {
		a.log.Warn("pod deleted, but not released", "pod", was.Namespace+"/"+was.Name, "path", was.Path, "error", err)
	}
	if h != nil {
		a.left(h) // the verb's success is on disk, too
		h.release()
	}
	rules <- err
}

// abandon is uncapture of a namespace that its pod has left for another: there is
// no delete that a ztunnel could answer. It takes h over.
func (a *Agent) abandon(h *handle) {
	defer h.release()
	defer a.left(h)
	if err := a.removeRules(h.ns); err != nil {
		a.log.Warn("pod replaced, but the namespace that it had is not released", "netns", h.ns.ID(), "error", err)
	}
}

// left forgets a namespace that a pod has left: its rules are out, or they stay.
func (a *Agent) left(h *handle) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.leaving, h)
	a.changed()
}

// releaseAgain takes the rules out of a namespace that an agent before this one has
// written down, if it is still where it was.
func (a *Agent) releaseAgain(r record) error {
	ns, err := netns.Open(r.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the rules have gone with the namespace
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errRules, err)
	}
	h := newHandle(ns, a.log)
	defer h.release()
	switch now, err := cookieOf(ns); {
	case err != nil:
		return fmt.Errorf("whether its path still leads to it: %w: %w", err, errRules)
	case r.Cookie == 0:
		return fmt.Errorf("nobody can tell whether its path still leads to it: %w", errRules)
	case r.Cookie != now:
		return nil // another one
	}
	if err := a.removeRules(ns); err != nil {
		return fmt.Errorf("%w: %w", errRules, err)
	}
	a.log.Info("pod released", "pod", r.Namespace+"/"+r.Name, "uid", r.UID, "netns", ns.ID())
	return nil
}

// removeRules takes the rules out, unless the namespace is a pod's again.
func (a *Agent) removeRules(ns *netns.NS) error {
	defer a.rules.lock(ns.ID())()
	a.mu.Lock()
	again := a.byNetNS[ns.ID()] != nil
	a.mu.Unlock()
	if again {
		return nil
	}
	return redirect.Remove(ns)
}

// turns gives each namespace's rules to one at a time. Whoever asks holds the
// namespace open, so that its ID is its own.
type turns struct {
	mu   sync.Mutex
	busy map[netns.ID]chan struct{}
}

// lock waits for the turn, and returns what ends it.
func (t *turns) lock(id netns.ID) (unlock func()) {
	for {
		t.mu.Lock()
		done, busy := t.busy[id]
		if !busy {
			break
		}
		t.mu.Unlock()
		<-done
	}
	if t.busy == nil {
		t.busy = make(map[netns.ID]chan struct{})
	}
	done := make(chan struct{})
	t.busy[id] = done
	t.mu.Unlock()
	return func() {
		t.mu.Lock()
		delete(t.busy, id)
		t.mu.Unlock()
		close(done)
	}
}

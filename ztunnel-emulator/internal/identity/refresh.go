package identity

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// How a failed request is repeated: after a second, then twice as late each time,
// up to 150 s, each ±20 %.
const (
	firstRetry  = time.Second
	maxRetry    = 150 * time.Second
	retrySpread = 0.2
)

// refresh is the one goroutine that renews in the background, with one timer.
func (m *Manager) refresh() {
	defer m.wg.Done()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-m.wake:
		case <-timer.C:
		}
		timer.Reset(m.startDue())
	}
}

// startDue starts as many of the due requests as may run, drops the identities
// that nobody wants, and returns how long nothing more is due. It looks at all: a
// node has some hundred identities.
func (m *Manager) startDue() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ctx.Err() != nil {
		return maxRetry // refresh ends before that
	}
	now := wallClock()
	wait := time.Hour
	var due []*entry
	for id, e := range m.entries {
		switch {
		case e.flight != nil:
			// Its end wakes us.
		case now.Before(e.due):
			wait = min(wait, e.due.Sub(now))
		case e.claims <= 0 && !e.asked:
			// Once asked for by somebody who claimed nothing, and not since.
			delete(m.entries, id)
		default:
			due = append(due, e)
		}
	}
	// Who has no certificate at all comes first, as in ztunnel.
	slices.SortFunc(due, func(a, b *entry) int {
		if (a.cert == nil) != (b.cert == nil) {
			if a.cert == nil {
				return -1
			}
			return 1
		}
		return a.due.Compare(b.due)
	})
	for _, e := range due {
		if m.background >= maxBackground {
			break // the end of one of them wakes us
		}
		m.background++
		m.start(e, m.fetchBackground)
	}
	return wait
}

// start starts e's request. Called with the lock held.
func (m *Manager) start(e *entry, fetch func(*entry, *flight)) {
	e.asked = false
	e.flight = &flight{done: make(chan struct{})}
	m.wg.Add(1)
	go fetch(e, e.flight)
}

// fetchUrgent makes a request that somebody waits for.
func (m *Manager) fetchUrgent(e *entry, f *flight) {
	defer m.wg.Done()
	select {
	case m.urgent <- struct{}{}:
		m.fetch(e, f)
		<-m.urgent
	case <-m.ctx.Done():
		f.err = m.ctx.Err()
		m.land(e, f)
	}
}

// fetchBackground makes a request that startDue has counted.
func (m *Manager) fetchBackground(e *entry, f *flight) {
	defer m.wg.Done()
	m.fetch(e, f)
	m.mu.Lock()
	m.background--
	m.mu.Unlock()
	m.poke()
}

func (m *Manager) fetch(e *entry, f *flight) {
	ctx, cancel := context.WithTimeout(m.ctx, issueTimeout)
	defer cancel()
	f.cert, f.err = m.issuer.Issue(ctx, e.id, m.opts.TTL)
	if f.err == nil {
		if ids, _ := idsOf(f.cert.TLS.Leaf); len(ids) == 0 || ids[0] != e.id {
			f.cert, f.err = nil, fmt.Errorf("the CA certified %q instead", uriSANs(f.cert.TLS.Leaf))
		}
	}
	m.land(e, f)
}

// land takes over what a request has brought and lets the waiting ones go on. An
// entry that was forgotten meanwhile is changed too, and nobody sees it.
func (m *Manager) land(e *entry, f *flight) {
	if f.err != nil && m.ctx.Err() != nil {
		f.err = ErrClosed
	}
	m.mu.Lock()
	now := wallClock()
	e.flight = nil
	if f.err == nil {
		e.cert, e.err, e.failures = f.cert, nil, 0
		e.due = now.Add(f.cert.TLS.Leaf.NotAfter.Sub(now) / 2)
	} else {
		wait := retryAfter(e.failures)
		e.err = f.err
		e.failures++
		e.due = now.Add(wait)
		if e.cert.validAt(now) && e.due.After(e.cert.TLS.Leaf.NotAfter) {
			e.due = e.cert.TLS.Leaf.NotAfter
		}
	}
	valid, due := e.cert.validAt(now), e.due
	m.mu.Unlock()
	close(f.done)
	m.poke()

	if f.err == nil {
		m.opts.Log.Debug("certificate issued", "identity", e.id.String(), "not_after", f.cert.TLS.Leaf.NotAfter)
	} else if m.ctx.Err() == nil {
		m.opts.Log.Warn("certificate not issued", "identity", e.id.String(), "error", f.err,
			"retry", due.Sub(now).Round(time.Millisecond), "have_valid", valid)
	}
}

// retryAfter returns how long to wait after that many failures before this one.
func retryAfter(failures int) time.Duration {
	wait := maxRetry
	if failures < 8 {
		wait = min(firstRetry<<failures, maxRetry)
	}
	spread := 1 + retrySpread*(2*rand.Float64()-1)
	return min(time.Duration(float64(wait)*spread), maxRetry)
}

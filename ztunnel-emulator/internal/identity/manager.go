package identity

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// DefaultTTL is a certificate's lifetime unless SECRET_TTL says otherwise.
const DefaultTTL = 24 * time.Hour

// How many certificates are issued at once, as in ztunnel: eight, and of these at
// most two in the background, so that a connection that waits for its first
// certificate does not wait for a node's worth of renewals.
const (
	maxUrgent     = 6
	maxBackground = 2
)

// issueTimeout bounds one request to an Issuer.
const issueTimeout = 10 * time.Second

// ErrClosed is what a closed Manager says.
var ErrClosed = errors.New("identity manager closed")

// Error says that an identity's own certificate cannot be had: IDENTITY_ERROR in
// the access log.
type Error struct {
	ID  ID
	Err error
}

func (e *Error) Error() string { return fmt.Sprintf("no certificate for %s: %v", e.ID, e.Err) }
func (e *Error) Unwrap() error { return e.Err }

// An Issuer makes a certificate with a new key for id, valid for ttl from now, and
// gives up when ctx ends. A CA is one.
type Issuer interface {
	Issue(ctx context.Context, id ID, ttl time.Duration) (*Certificate, error)
}

// Options of a Manager. The zero value is ztunnel's default.
type Options struct {
	TTL   time.Duration // SECRET_TTL; 0 is DefaultTTL
	TLS12 bool          // TLS12_ENABLED: TLS 1.2 besides 1.3
	PQC   bool          // COMPLIANCE_POLICY=pqc: X25519MLKEM768 is the only key exchange
	CRL   *CRL          // CRL_PATH: nil checks nothing. The caller closes it, after the Manager
	Log   *slog.Logger  // nil is slog.Default()
}

// Manager holds the certificates of the local workloads' identities. It is safe
// for concurrent use.
type Manager struct {
	issuer Issuer
	opts   Options

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	wake   chan struct{} // one token: there may be something new to do
	urgent chan struct{} // a token for each urgent request under way

	mu         sync.Mutex
	entries    map[ID]*entry
	background int // requests under way in the background
}

// entry is one identity's certificate through time. Manager.mu guards it.
type entry struct {
	id     ID
	claims int  // Prefetch less Forget
	asked  bool // since the last request was started

	cert     *Certificate // the newest, perhaps expired; nil at first
	err      error        // why the last request failed; nil if it did not
	failures int          // in a row
	due      time.Time    // when the background makes the next request
	flight   *flight      // the request under way, or nil
}

// flight is one request to the issuer, and what it brought once done is closed.
type flight struct {
	done chan struct{}
	cert *Certificate
	err  error
}

// NewManager starts a Manager, whose owner closes it.
func NewManager(issuer Issuer, opts Options) *Manager {
	opts.TTL = cmp.Or(opts.TTL, DefaultTTL)
	opts.Log = cmp.Or(opts.Log, slog.Default())
	m := &Manager{
		issuer:  issuer,
		opts:    opts,
		wake:    make(chan struct{}, 1),
		urgent:  make(chan struct{}, maxUrgent),
		entries: make(map[ID]*entry),
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.wg.Add(1)
	go m.refresh()
	return m
}

// Close stops renewing and waits until nothing is under way. From then on no
// certificate is to be had; connections that stand are not touched.
func (m *Manager) Close() {
	m.mu.Lock()
	m.cancel() // under the lock: no request starts after it
	m.mu.Unlock()
	m.wg.Wait()
}

// Certificate returns id's current certificate, and waits for it to be issued if
// there is none, or only an expired one. Callers that wait for the same identity
// share one request. While a failed request waits for its retry, the reason is
// returned at once. An error is an *Error.
func (m *Manager) Certificate(ctx context.Context, id ID) (*Certificate, error) {
	m.mu.Lock()
	if m.ctx.Err() != nil {
		m.mu.Unlock()
		return nil, &Error{id, ErrClosed}
	}
	e := m.entry(id)
	now := wallClock()
	if e.cert.validAt(now) {
		cert := e.cert
		e.asked = true
		if !now.Before(e.due) {
			m.poke() // timers stand still while a machine is suspended
		}
		m.mu.Unlock()
		return cert, nil
	}
	if e.flight == nil {
		if e.err != nil && now.Before(e.due) {
			err := e.err
			m.mu.Unlock()
			return nil, &Error{id, err}
		}
		m.start(e, m.fetchUrgent)
	}
	e.asked = true
	f := e.flight
	m.mu.Unlock()

	select {
	case <-f.done:
	case <-ctx.Done():
		return nil, &Error{id, context.Cause(ctx)}
	}
	if f.err != nil {
		return nil, &Error{id, f.err}
	}
	return f.cert, nil
}

// Prefetch claims id for one local workload: its certificate is issued in the
// background and kept fresh until Forget was called as often.
func (m *Manager) Prefetch(id ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ctx.Err() != nil {
		return
	}
	m.entry(id).claims++
	m.poke()
}

// Forget gives one claim back. With the last one the certificate is dropped.
func (m *Manager) Forget(id ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[id]
	if e == nil {
		return
	}
	if e.claims--; e.claims <= 0 {
		delete(m.entries, id)
		m.opts.Log.Debug("certificate dropped: nobody uses the identity", "identity", id.String())
	}
}

// Status is one identity in a Manager.
type Status struct {
	ID          ID
	Certificate *Certificate // nil unless a valid one is there
	Err         error        // why the last request failed; nil if it did not
}

// State returns what ztunnel's config dump calls the state of the identity.
func (s Status) State() string {
	switch {
	case s.Certificate != nil:
		return "Available"
	case s.Err != nil:
		return "Unavailable: " + s.Err.Error()
	}
	return "Initializing"
}

// Certificates returns all identities held, sorted.
func (m *Manager) Certificates() []Status {
	m.mu.Lock()
	all := make([]Status, 0, len(m.entries))
	now := wallClock()
	for id, e := range m.entries {
		s := Status{ID: id, Err: e.err}
		if e.cert.validAt(now) {
			s.Certificate = e.cert
		}
		all = append(all, s)
	}
	m.mu.Unlock()
	slices.SortFunc(all, func(a, b Status) int { return cmp.Compare(a.ID.String(), b.ID.String()) })
	return all
}

// entry returns id's entry, new if there is none: then its first request is due.
// Called with the lock held.
func (m *Manager) entry(id ID) *entry {
	e := m.entries[id]
	if e == nil {
		e = &entry{id: id, due: wallClock()}
		m.entries[id] = e
	}
	return e
}

// poke makes refresh look again.
func (m *Manager) poke() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// wallClock is time.Now without its monotonic reading, which stands still while a
// machine is suspended: validity does not.
func wallClock() time.Time { return time.Now().Round(0) }

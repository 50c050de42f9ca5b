package identity_test

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	. "ambient-emulator/ztunnel-emulator/internal/identity"
	"ambient-emulator/ztunnel-emulator/internal/identity/identitytest"
)

// fakeIssuer is a CA that counts, and that fails or hangs when told to.
type fakeIssuer struct {
	*identitytest.CA

	mu      sync.Mutex
	fail    error
	hang    bool // until the request's context ends, or release
	release chan struct{}
	as      *ID // certify this one instead
	calls   []call
	running int
	most    int // at once
}

type call struct {
	id ID
	at time.Time
}

func (f *fakeIssuer) Issue(ctx context.Context, id ID, ttl time.Duration) (*Certificate, error) {
	f.mu.Lock()
	f.calls = append(f.calls, call{id, time.Now()})
	f.running++
	f.most = max(f.most, f.running)
	fail, hang, as := f.fail, f.hang, f.as
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.running--
		f.mu.Unlock()
	}()
	if hang {
		select {
		case <-f.release:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if fail != nil {
		return nil, fail
	}
	if as != nil {
		id = *as
	}
	return f.CA.Issue(ctx, id, ttl)
}

func (f *fakeIssuer) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// taken returns the calls so far and forgets them.
func (f *fakeIssuer) taken() []call {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.calls
	f.calls = nil
	return c
}

// inBubble runs a test in which time is ours: it starts on a whole second, and
// certificates count in whole seconds.
func inBubble(t *testing.T, opts Options, test func(t *testing.T, m *Manager, f *fakeIssuer)) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{CA: identitytest.NewCA(t), release: make(chan struct{})}
		if opts.Log == nil {
			opts.Log = slog.New(slog.DiscardHandler)
		}
		m := NewManager(f, opts)
		defer m.Close()
		test(t, m, f)
	})
}

// get returns the serial of id's certificate.
func get(t *testing.T, m *Manager, id ID) string {
	t.Helper()
	cert, err := m.Certificate(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if cert.ID != id {
		t.Fatalf("asked for %v, got %v", id, cert.ID)
	}
	return cert.TLS.Leaf.SerialNumber.String()
}

func wantCalls(t *testing.T, f *fakeIssuer, want int) []call {
	t.Helper()
	synctest.Wait()
	calls := f.taken()
	if len(calls) != want {
		t.Fatalf("%d requests, want %d: %v", len(calls), want, calls)
	}
	return calls
}

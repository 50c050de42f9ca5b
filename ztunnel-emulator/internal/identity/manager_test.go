package identity_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	. "ambient-emulator/ztunnel-emulator/internal/identity"
)

func TestManagerSharesRequests(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, m *Manager, f *fakeIssuer) {
		f.set(func() { f.hang = true })
		var wg sync.WaitGroup
		serials := make([]string, 20)
		for i := range serials {
			wg.Go(func() { serials[i] = get(t, m, client) })
		}
		synctest.Wait()
		if states := m.Certificates(); len(states) != 1 || states[0].State() != "Initializing" {
			t.Errorf("while it hangs: %v", states)
		}
		close(f.release)
		wg.Wait()
		for _, s := range serials {
			if s != serials[0] {
				t.Errorf("serials %q", serials)
				break
			}
		}
		if get(t, m, client) != serials[0] {
			t.Error("asked again, got another")
		}
		wantCalls(t, f, 1)
	})
}

func TestManagerRenewsAtHalf(t *testing.T) {
	inBubble(t, Options{TTL: 24 * time.Hour}, func(t *testing.T, m *Manager, f *fakeIssuer) {
		start := time.Now()
		m.Prefetch(client)
		wantCalls(t, f, 1)
		first := get(t, m, client)
		time.Sleep(12*time.Hour - time.Second)
		wantCalls(t, f, 0)
		if get(t, m, client) != first {
			t.Error("another certificate before half of its time")
		}
		time.Sleep(2 * time.Second)
		calls := wantCalls(t, f, 1)
		if d := calls[0].at.Sub(start); d != 12*time.Hour {
			t.Errorf("renewed after %v", d)
		}
		if get(t, m, client) == first {
			t.Error("the old certificate after half of its time")
		}
		time.Sleep(12 * time.Hour)
		wantCalls(t, f, 1)
	})
}

// Without a certificate the reason is told at once and the retries come later each
// time; with one it is kept.
func TestManagerRetries(t *testing.T) {
	var log bytes.Buffer
	inBubble(t, Options{Log: slog.New(slog.NewTextHandler(&log, nil))}, func(t *testing.T, m *Manager, f *fakeIssuer) {
		down := errors.New("out of ink")
		f.set(func() { f.fail = down })
		m.Prefetch(client)
		synctest.Wait()
		var ierr *Error
		if _, err := m.Certificate(t.Context(), client); !errors.Is(err, down) || !errors.As(err, &ierr) || ierr.ID != client {
			t.Errorf("error %v", err)
		}
		if got := m.Certificates()[0].State(); got != "Unavailable: out of ink" {
			t.Errorf("state %q", got)
		}
		time.Sleep(20 * time.Minute)
		calls := f.taken()
		for i := 1; i < len(calls); i++ {
			got := calls[i].at.Sub(calls[i-1].at)
			nominal := min(time.Second<<(i-1), 150*time.Second)
			if got < nominal*8/10 || got > min(nominal*12/10, 150*time.Second) {
				t.Errorf("retry %d after %v, want %v ±20 %%", i, got, nominal)
			}
		}
		if len(calls) < 14 || len(calls) > 18 {
			t.Errorf("%d requests in 20 minutes", len(calls))
		}
		f.set(func() { f.fail = nil })
		time.Sleep(150 * time.Second)
		get(t, m, client)
		wantCalls(t, f, 1)
		if s := m.Certificates()[0]; s.State() != "Available" || s.Err != nil {
			t.Errorf("state %q, %v", s.State(), s.Err)
		}
		if line, _, _ := strings.Cut(log.String(), "\n"); !strings.Contains(line, `msg="certificate not issued" identity=spiffe://cluster.local/ns/default/sa/client error="out of ink" retry=`) {
			t.Errorf("log %s", line)
		}
	})
}

func TestManagerKeepsValid(t *testing.T) {
	inBubble(t, Options{TTL: 10 * time.Second}, func(t *testing.T, m *Manager, f *fakeIssuer) {
		start := time.Now()
		m.Prefetch(client)
		wantCalls(t, f, 1)
		first := get(t, m, client)
		f.set(func() { f.fail = errors.New("out of ink") })
		for time.Since(start) < 9*time.Second {
			time.Sleep(100 * time.Millisecond)
			if get(t, m, client) != first {
				t.Fatal("another certificate from a CA that signs none")
			}
		}
		if s := m.Certificates()[0]; s.State() != "Available" || s.Err == nil {
			t.Errorf("state %q, %v", s.State(), s.Err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		// 5 s, 6 s, 8 s, and not 12 s but the moment of expiry.
		calls := f.taken()
		if n := len(calls); n != 4 || calls[n-1].at.Sub(start) != 10*time.Second {
			t.Errorf("requests %v", calls)
		}
		if cert, err := m.Certificate(t.Context(), client); err == nil {
			t.Errorf("an expired certificate of %v", cert.TLS.Leaf.NotAfter)
		}
		f.set(func() { f.fail = nil })
		time.Sleep(30 * time.Second)
		if get(t, m, client) == first {
			t.Error("the expired certificate")
		}
	})
}

func TestManagerClaims(t *testing.T) {
	inBubble(t, Options{TTL: 10 * time.Second}, func(t *testing.T, m *Manager, f *fakeIssuer) {
		m.Forget(client) // nobody's
		m.Prefetch(client)
		m.Prefetch(client)
		m.Prefetch(server)
		wantCalls(t, f, 2)
		first := get(t, m, client)
		m.Forget(client)
		if get(t, m, client) != first {
			t.Error("one of two claims given back, and the certificate is gone")
		}
		if all := m.Certificates(); len(all) != 2 || all[0].ID != client || all[1].ID != server {
			t.Errorf("held: %v", all)
		}
		m.Forget(client)
		if all := m.Certificates(); len(all) != 1 || all[0].ID != server {
			t.Errorf("held after the last claim: %v", all)
		}
		m.Forget(client)
		time.Sleep(6 * time.Second)
		if calls := wantCalls(t, f, 1); calls[0].id != server {
			t.Errorf("renewed %v", calls)
		}
		// It may come back.
		m.Prefetch(client)
		wantCalls(t, f, 1)
		if get(t, m, client) == first {
			t.Error("the forgotten certificate")
		}
	})
}

// What somebody asks for without a claim is kept while asked for, and not longer.
func TestManagerUnclaimed(t *testing.T) {
	inBubble(t, Options{TTL: 10 * time.Second}, func(t *testing.T, m *Manager, f *fakeIssuer) {
		for range 20 {
			get(t, m, client)
			time.Sleep(time.Second)
		}
		wantCalls(t, f, 5) // at 0, 5, 10, 15 and 20 s
		time.Sleep(11 * time.Second)
		synctest.Wait()
		if all := m.Certificates(); len(all) != 0 {
			t.Errorf("still held: %v", all)
		}
		f.taken()
		time.Sleep(time.Hour)
		wantCalls(t, f, 0)
	})
}

// Forgotten while the request is under way: who waits gets it, nobody keeps it.
func TestManagerForgetsDuringRequest(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, m *Manager, f *fakeIssuer) {
		f.set(func() { f.hang = true })
		m.Prefetch(client)
		var wg sync.WaitGroup
		wg.Go(func() { get(t, m, client) })
		synctest.Wait()
		m.Forget(client)
		close(f.release)
		wg.Wait()
		if all := m.Certificates(); len(all) != 0 {
			t.Errorf("held: %v", all)
		}
	})
}

func TestManagerWaitsNoLongerThanAsked(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, m *Manager, f *fakeIssuer) {
		f.set(func() { f.hang = true })
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		start := time.Now()
		var ierr *Error
		if _, err := m.Certificate(ctx, client); !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &ierr) {
			t.Errorf("error %v", err)
		}
		if d := time.Since(start); d != 3*time.Second {
			t.Errorf("waited %v", d)
		}
		// The request itself goes on, and has an end too.
		if _, err := m.Certificate(t.Context(), client); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
		if d := time.Since(start); d != 10*time.Second {
			t.Errorf("a request that hangs ended after %v", d)
		}
		wantCalls(t, f, 1)
	})
}

// A node's worth of prefetches does not stand before one that is needed now.
func TestManagerUrgentFirst(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, m *Manager, f *fakeIssuer) {
		f.set(func() { f.hang = true })
		for i := range 50 {
			m.Prefetch(ID{"td", "ns", fmt.Sprint(i)})
		}
		wantCalls(t, f, 2)
		var wg sync.WaitGroup
		wg.Go(func() { get(t, m, client) })
		if calls := wantCalls(t, f, 1); calls[0].id != client {
			t.Errorf("requested %v", calls)
		}
		for i := range 20 {
			wg.Go(func() { get(t, m, ID{"td", "urgent", fmt.Sprint(i)}) })
		}
		wantCalls(t, f, 5)
		close(f.release)
		wg.Wait()
		wantCalls(t, f, 50-2+20-5)
		if f.most != 8 {
			t.Errorf("%d requests at once, want 8", f.most)
		}
	})
}

func TestManagerWrongIdentity(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, m *Manager, f *fakeIssuer) {
		f.set(func() { f.as = &other })
		if _, err := m.Certificate(t.Context(), client); err == nil || !strings.Contains(err.Error(), `the CA certified ["spiffe://cluster.local/ns/default/sa/other"] instead`) {
			t.Errorf("error %v", err)
		}
	})
}

func TestManagerClose(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, m *Manager, f *fakeIssuer) {
		get(t, m, server)
		f.set(func() { f.hang = true })
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() {
				if _, err := m.Certificate(t.Context(), ID{"td", "urgent", fmt.Sprint(i)}); !errors.Is(err, ErrClosed) {
					t.Errorf("who waits during Close is told %v", err)
				}
			})
		}
		m.Prefetch(client)
		synctest.Wait()
		start := time.Now()
		m.Close()
		wg.Wait()
		if d := time.Since(start); d != 0 {
			t.Errorf("Close took %v", d)
		}
		f.mu.Lock()
		running := f.running
		f.mu.Unlock()
		if running != 0 {
			t.Errorf("%d requests under way after Close", running)
		}
		for _, id := range []ID{server, client, other} {
			if _, err := m.Certificate(t.Context(), id); !errors.Is(err, ErrClosed) {
				t.Errorf("%v after Close: %v", id, err)
			}
		}
		m.Prefetch(other)
		m.Forget(client)
		m.Close() // twice is once
	})
}

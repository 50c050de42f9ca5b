package identity_test

import (
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	. "ambient-emulator/ztunnel-emulator/internal/identity"
)

// Certificates of ten seconds, as in ztunnel's own tests: a connection that
// stands outlives them all, and of those that come and go at any moment none fails.
func TestRotation(t *testing.T) {
	inBubble(t, Options{TTL: 10 * time.Second, Log: slog.New(slog.DiscardHandler)}, func(t *testing.T, m *Manager, _ *fakeIssuer) {
		m.Prefetch(client)
		m.Prefetch(server)
		clientConfig, serverConfig := m.ClientConfig(client, []ID{server}), m.ServerConfig(server)

		cc, sc := net.Pipe()
		standing, echo := tls.Client(cc, clientConfig), tls.Server(sc, serverConfig)
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := io.Copy(echo, echo)
			if err != nil {
				t.Errorf("echo: %v", err)
			}
			echo.Close()
		})

		var mu sync.Mutex
		serials := map[string]bool{}
		for range 4 {
			wg.Go(func() {
				for range 40 {
					cs, err := shakePipe(clientConfig, serverConfig)
					if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					serials[cs.PeerCertificates[0].SerialNumber.String()] = true
					mu.Unlock()
					time.Sleep(time.Second)
				}
			})
		}
		buf := make([]byte, 4)
		for range 40 {
			if _, err := standing.Write([]byte("ping")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(standing, buf); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		standing.CloseWrite()
		wg.Wait()
		standing.Close()
		if n := len(serials); n != 8 {
			t.Errorf("%d certificates in 40 seconds, want 8", n)
		}
	})
}

// shakePipe runs a handshake and returns what the client saw.
func shakePipe(clientConfig, serverConfig *tls.Config) (tls.ConnectionState, error) {
	cc, sc := net.Pipe()
	c, s := tls.Client(cc, clientConfig), tls.Server(sc, serverConfig)
	defer cc.Close()
	defer sc.Close()
	done := make(chan error, 1)
	go func() { done <- s.Handshake() }()
	err := c.Handshake()
	if err != nil {
		cc.Close()
	}
	return c.ConnectionState(), errors.Join(err, <-done)
}

// A certificate that expires while the CA is down: new connections fail with the
// reason, and on the side that lacks it.
func TestExpiryWithoutCA(t *testing.T) {
	inBubble(t, Options{TTL: 10 * time.Second}, func(t *testing.T, m *Manager, f *fakeIssuer) {
		m.Prefetch(client)
		m.Prefetch(server)
		synctest.Wait()
		down := errors.New("out of ink")
		f.set(func() { f.fail = down })
		clientConfig, serverConfig := m.ClientConfig(client, []ID{server}), m.ServerConfig(server)
		time.Sleep(9 * time.Second)
		if _, err := shakePipe(clientConfig, serverConfig); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Second)
		var ierr *Error
		if _, err := shakePipe(clientConfig, serverConfig); !errors.Is(err, down) || !errors.As(err, &ierr) {
			t.Errorf("error %v", err)
		}
	})
}

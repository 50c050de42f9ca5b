package identity_test

import (
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"testing"
	"time"

	. "ambient-emulator/ztunnel-emulator/internal/identity"
	"ambient-emulator/ztunnel-emulator/internal/identity/identitytest"
)

func BenchmarkIssue(b *testing.B) {
	ca, err := OpenCA(b.TempDir() + "/ca")
	must(b, err)
	for b.Loop() {
		if _, err := ca.Issue(b.Context(), client, time.Hour); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCurrentCertificate(b *testing.B) {
	m := benchManager(b, Options{})
	for b.Loop() {
		if _, err := m.Certificate(b.Context(), client); err != nil {
			b.Fatal(err)
		}
	}
}

// With a list of ten thousand.
func BenchmarkCRLCheck(b *testing.B) {
	ca := identitytest.NewCA(b)
	good := ca.Sign(b, identitytest.Good(client))
	revoked := make([]*x509.Certificate, 10_000)
	for i := range revoked {
		revoked[i] = &x509.Certificate{SerialNumber: big.NewInt(int64(i + 1))}
	}
	crl, err := ParseCRL(ca.CRL(b, revoked...), ca.Roots())
	must(b, err)
	for b.Loop() {
		if err := crl.Check(chainOf(good)); err != nil {
			b.Fatal(err)
		}
	}
}

// Both ends, over a pipe.
func BenchmarkHandshake(b *testing.B) {
	for _, bench := range []struct {
		name string
		opts Options
	}{{"default", Options{}}, {"pqc", Options{PQC: true}}} {
		b.Run(bench.name, func(b *testing.B) {
			m := benchManager(b, bench.opts)
			clientConfig, serverConfig := m.ClientConfig(client, []ID{server}), m.ServerConfig(server)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := shakePipe(clientConfig, serverConfig); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("floor", func(b *testing.B) { // what crypto/tls itself takes
		m := benchManager(b, Options{})
		sc, err := m.Certificate(b.Context(), server)
		must(b, err)
		cc, err := m.Certificate(b.Context(), client)
		must(b, err)
		pool := x509.NewCertPool()
		pool.AddCert(sc.Roots[0])
		serverConfig := &tls.Config{Certificates: []tls.Certificate{sc.TLS}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, SessionTicketsDisabled: true}
		clientConfig := &tls.Config{Certificates: []tls.Certificate{cc.TLS}, InsecureSkipVerify: true}
		b.ReportAllocs()
		for b.Loop() {
			if _, err := shakePipe(clientConfig, serverConfig); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func benchManager(b *testing.B, opts Options) *Manager {
	ca, err := OpenCA(b.TempDir() + "/ca")
	must(b, err)
	m := NewManager(ca, opts)
	b.Cleanup(m.Close)
	for _, id := range []ID{client, server} {
		_, err := m.Certificate(b.Context(), id)
		must(b, err)
	}
	return m
}

package identity_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	. "ambient-emulator/ztunnel-emulator/internal/identity"
	"ambient-emulator/ztunnel-emulator/internal/identity/identitytest"
)

var (
	client = ID{"cluster.local", "default", "client"}
	server = ID{"cluster.local", "default", "server"}
	other  = ID{"cluster.local", "default", "other"}
)

// end is one side of a handshake after it, and after one byte in each direction:
// only then does a TLS 1.3 client know whether it was let in.
type end struct {
	cs  tls.ConnectionState
	err error
}

// shake runs a handshake over loopback TCP and returns both ends closed.
func shake(t *testing.T, clientConfig, serverConfig *tls.Config) (c, s end) {
	t.Helper()
	cc, sc := tcpPair(t)
	done := make(chan end, 1)
	go func() { done <- exchange(t.Context(), tls.Server(sc, serverConfig)) }()
	c = exchange(t.Context(), tls.Client(cc, clientConfig))
	s = <-done
	return c, s
}

// exchange owns and closes c.
func exchange(ctx context.Context, c *tls.Conn) end {
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if err := Handshake(ctx, c); err != nil {
		return end{err: err}
	}
	_, err := c.Write([]byte{'x'})
	if err == nil {
		_, err = io.ReadFull(c, make([]byte, 1))
	}
	return end{cs: c.ConnectionState(), err: err}
}

// tcpPair returns the two ends of a connection; the test's end closes them.
func tcpPair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func TestHandshake(t *testing.T) {
	m := identitytest.NewCA(t).NewManager(t, Options{})
	c, s := shake(t, m.ClientConfig(client, []ID{other, server}), m.ServerConfig(server))
	if c.err != nil || s.err != nil {
		t.Fatalf("client: %v; server: %v", c.err, s.err)
	}
	if id, ok := PeerID(c.cs); !ok || id != server {
		t.Errorf("client's peer is %v, %v", id, ok)
	}
	if id, ok := PeerID(s.cs); !ok || id != client {
		t.Errorf("server's peer is %v, %v", id, ok)
	}
	for name, cs := range map[string]tls.ConnectionState{"client": c.cs, "server": s.cs} {
		if cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != "h2" || cs.ServerName != "" || cs.DidResume {
			t.Errorf("%s: version %x, protocol %q, server name %q, resumed %v", name, cs.Version, cs.NegotiatedProtocol, cs.ServerName, cs.DidResume)
		}
		if n := len(cs.PeerCertificates); n != 1 {
			t.Errorf("%s was shown %d certificates, want the leaf alone", name, n)
		}
	}
}

// A stranger's certificate writes no novel into our log.
func TestLongSAN(t *testing.T) {
	ca, strangers := identitytest.NewCA(t), identitytest.NewCA(t)
	m := ca.NewManager(t, Options{})
	long := identitytest.Good(client)
	for range 50 {
		long.URIs = append(long.URIs, client.String()+strings.Repeat("x", 1000))
	}
	_, s := shake(t, identitytest.ClientConfig(strangers.Sign(t, long)), m.ServerConfig(server))
	if s.err == nil || len(s.err.Error()) > 1000 || !strings.HasPrefix(s.err.Error(), "peer "+client.String()+" and ") {
		t.Errorf("server: %v", s.err)
	}
}

// The server, told the truth about who came.
func TestServerRefuses(t *testing.T) {
	ca, strangers := identitytest.NewCA(t), identitytest.NewCA(t)
	m := ca.NewManager(t, Options{})
	stranger := strangers.Sign(t, identitytest.Good(client))
	tls12 := identitytest.ClientConfig(ca.Sign(t, identitytest.Good(client)))
	tls12.MaxVersion = tls.VersionTLS12
	http11 := identitytest.ClientConfig(ca.Sign(t, identitytest.Good(client)))
	http11.NextProtos = []string{"http/1.1"}

	for _, tt := range []struct {
		name   string
		client *tls.Config
		want   string // in the server's error
		alert  string // in the client's
	}{
		{"no certificate", identitytest.ClientConfig(), "didn't provide a certificate", "certificate required"},
		{"other root", identitytest.ClientConfig(stranger), "peer spiffe://cluster.local/ns/default/sa/client: tls: failed to verify certificate: x509: certificate signed by unknown authority", "unknown certificate authority"},
		{"expired", identitytest.ClientConfig(ca.Sign(t, identitytest.Expired(client))), "has expired or is not yet valid", "expired certificate"},
		{"not yet valid", identitytest.ClientConfig(ca.Sign(t, identitytest.NotYetValid(client))), "is not yet valid", "expired certificate"},
		{"wrong usage", identitytest.ClientConfig(ca.Sign(t, identitytest.OnlyUsage(client, x509.ExtKeyUsageServerAuth))), "incompatible key usage", "bad certificate"},
		{"no SAN", identitytest.ClientConfig(ca.Sign(t, identitytest.NoSAN())), `peer without a URI SAN: expected trust domain "cluster.local"`, "bad certificate"},
		{"DNS SAN", identitytest.ClientConfig(ca.Sign(t, identitytest.OnlyDNS(client))), `peer without a URI SAN: expected trust domain "cluster.local"`, "bad certificate"},
		{"other trust domain", identitytest.ClientConfig(ca.Sign(t, identitytest.OtherDomain(client))), `peer spiffe://elsewhere.cluster.local/ns/default/sa/client: expected trust domain "cluster.local"`, "bad certificate"},
		{"TLS 1.2", tls12, "client offered only unsupported versions", "protocol version not supported"},
		{"ALPN", http11, "unsupported application protocols", "no application protocol"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, s := shake(t, tt.client, m.ServerConfig(server))
			if s.err == nil || !strings.Contains(s.err.Error(), tt.want) {
				t.Errorf("server: %v\nwant %s", s.err, tt.want)
			}
			if c.err == nil || !strings.Contains(c.err.Error(), tt.alert) {
				t.Errorf("client: %v\nwant %s", c.err, tt.alert)
			}
		})
	}
}

func TestServerAccepts(t *testing.T) {
	ca := identitytest.NewCA(t)
	m := ca.NewManager(t, Options{})
	noALPN := identitytest.ClientConfig(ca.Sign(t, identitytest.Good(client)))
	noALPN.NextProtos = nil
	sni := identitytest.ClientConfig(ca.Sign(t, identitytest.Good(client)))
	sni.ServerName = "ignored.example"
	several := identitytest.Good(client)
	several.URIs = []string{"https://example.com/", "spiffe://elsewhere/ns/a/sa/b", client.String()}

	for _, tt := range []struct {
		name   string
		client *tls.Config
		proto  string
		peer   ID
	}{
		{"no ALPN", noALPN, "", client},
		{"SNI", sni, "h2", client},
		// One of our trust domain lets it in, and the first that parses is who it is.
		{"several SANs", identitytest.ClientConfig(ca.Sign(t, several)), "h2", ID{"elsewhere", "a", "b"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, s := shake(t, tt.client, m.ServerConfig(server))
			if c.err != nil || s.err != nil {
				t.Fatalf("client: %v; server: %v", c.err, s.err)
			}
			if s.cs.NegotiatedProtocol != tt.proto {
				t.Errorf("protocol %q, want %q", s.cs.NegotiatedProtocol, tt.proto)
			}
			if id, ok := PeerID(s.cs); !ok || id != tt.peer {
				t.Errorf("peer %v, %v, want %v", id, ok, tt.peer)
			}
		})
	}
}

func TestClientRefuses(t *testing.T) {
	ca, strangers := identitytest.NewCA(t), identitytest.NewCA(t)
	m := ca.NewManager(t, Options{})
	tls12 := identitytest.ServerConfig(ca.Sign(t, identitytest.Good(server)))
	tls12.MaxVersion = tls.VersionTLS12

	for _, tt := range []struct {
		name     string
		server   *tls.Config
		expected []ID
		want     string
	}{
		{"other root", identitytest.ServerConfig(strangers.Sign(t, identitytest.Good(server))), []ID{server}, "peer spiffe://cluster.local/ns/default/sa/server: tls: failed to verify certificate: x509: certificate signed by unknown authority"},
		{"expired", identitytest.ServerConfig(ca.Sign(t, identitytest.Expired(server))), []ID{server}, "has expired"},
		{"not yet valid", identitytest.ServerConfig(ca.Sign(t, identitytest.NotYetValid(server))), []ID{server}, "is not yet valid"},
		{"wrong usage", identitytest.ServerConfig(ca.Sign(t, identitytest.OnlyUsage(server, x509.ExtKeyUsageClientAuth))), []ID{server}, "incompatible key usage"},
		{"no SAN", identitytest.ServerConfig(ca.Sign(t, identitytest.NoSAN())), []ID{server}, "peer without a URI SAN: expected spiffe://cluster.local/ns/default/sa/server"},
		{"DNS SAN", identitytest.ServerConfig(ca.Sign(t, identitytest.OnlyDNS(server))), []ID{server}, "peer without a URI SAN"},
		{"other trust domain", identitytest.ServerConfig(ca.Sign(t, identitytest.OtherDomain(server))), []ID{server}, "peer spiffe://elsewhere.cluster.local/ns/default/sa/server: expected spiffe://cluster.local/ns/default/sa/server"},
		{"wrong identity", m.ServerConfig(other), []ID{server, client}, "peer spiffe://cluster.local/ns/default/sa/other: expected spiffe://cluster.local/ns/default/sa/server or spiffe://cluster.local/ns/default/sa/client"},
		{"nobody expected", m.ServerConfig(server), nil, "peer spiffe://cluster.local/ns/default/sa/server: expected nobody"},
		{"TLS 1.2", tls12, []ID{server}, "protocol version not supported"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, s := shake(t, m.ClientConfig(client, tt.expected), tt.server)
			if c.err == nil || !strings.Contains(c.err.Error(), tt.want) {
				t.Errorf("client: %v\nwant %s", c.err, tt.want)
			}
			if s.err == nil {
				t.Error("the server saw nothing of it")
			}
		})
	}
}

// Any of the server's SANs may be the expected one, and a server that selects no
// protocol is taken to speak h2.
func TestClientAccepts(t *testing.T) {
	ca := identitytest.NewCA(t)
	m := ca.NewManager(t, Options{})
	several := identitytest.Good(other)
	several.URIs = append(several.URIs, server.String())
	config := identitytest.ServerConfig(ca.Sign(t, several))
	config.NextProtos = nil
	var sni string
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		sni = hello.ServerName
		if !slices.Equal(hello.SupportedProtos, []string{"h2"}) {
			t.Errorf("client offers %q", hello.SupportedProtos)
		}
		if !slices.Equal(hello.SupportedVersions, []uint16{tls.VersionTLS13}) {
			t.Errorf("client offers versions %x", hello.SupportedVersions)
		}
		return nil, nil
	}
	c, s := shake(t, m.ClientConfig(client, []ID{server}), config)
	if c.err != nil || s.err != nil {
		t.Fatalf("client: %v; server: %v", c.err, s.err)
	}
	if sni != "" {
		t.Errorf("client sent SNI %q", sni)
	}
	if id, _ := PeerID(c.cs); id != other {
		t.Errorf("peer is %v, want the first SAN", id)
	}
	if id, _ := PeerID(s.cs); id != client {
		t.Errorf("the server was shown %v", id)
	}
}

func TestTLSOptions(t *testing.T) {
	ca := identitytest.NewCA(t)
	old := identitytest.ClientConfig(ca.Sign(t, identitytest.Good(client)))
	old.MaxVersion = tls.VersionTLS12
	classic := identitytest.ClientConfig(ca.Sign(t, identitytest.Good(client)))
	classic.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP256}

	t.Run("TLS 1.2", func(t *testing.T) {
		m := ca.NewManager(t, Options{TLS12: true})
		if c, s := shake(t, old, m.ServerConfig(server)); c.err != nil || s.err != nil || s.cs.Version != tls.VersionTLS12 {
			t.Errorf("client: %v; server: %v; version %x", c.err, s.err, s.cs.Version)
		}
		if c, s := shake(t, m.ClientConfig(client, []ID{server}), m.ServerConfig(server)); c.err != nil || s.err != nil || s.cs.Version != tls.VersionTLS13 {
			t.Errorf("client: %v; server: %v; version %x", c.err, s.err, s.cs.Version)
		}
		cbc := old.Clone()
		cbc.CipherSuites = []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}
		if _, s := shake(t, cbc, m.ServerConfig(server)); s.err == nil {
			t.Error("a CBC suite was accepted")
		}
	})
	t.Run("PQC", func(t *testing.T) {
		m := ca.NewManager(t, Options{PQC: true})
		c, s := shake(t, m.ClientConfig(client, []ID{server}), m.ServerConfig(server))
		if c.err != nil || s.err != nil || c.cs.CurveID != tls.X25519MLKEM768 {
			t.Errorf("client: %v; server: %v; key exchange %v", c.err, s.err, c.cs.CurveID)
		}
		if _, s := shake(t, classic, m.ServerConfig(server)); s.err == nil {
			t.Error("a classic key exchange was accepted")
		}
	})
	t.Run("default", func(t *testing.T) {
		m := ca.NewManager(t, Options{})
		if c, s := shake(t, classic, m.ServerConfig(server)); c.err != nil || s.err != nil {
			t.Errorf("client: %v; server: %v", c.err, s.err)
		}
	})
}

// An identity that can't be had is an *Error on the side that lacks it.
func TestNoCertificate(t *testing.T) {
	m := identitytest.NewCA(t).NewManager(t, Options{})
	broken := ID{"error", "default", "client"}

	c, _ := shake(t, m.ClientConfig(broken, []ID{server}), m.ServerConfig(server))
	var ierr *Error
	if !errors.As(c.err, &ierr) || ierr.ID != broken {
		t.Errorf("client: %v", c.err)
	}
	_, s := shake(t, m.ClientConfig(client, []ID{server}), m.ServerConfig(broken))
	if !errors.As(s.err, &ierr) || ierr.ID != broken {
		t.Errorf("server: %v", s.err)
	}
}

package mesh

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const revokedText = "connection closed: peer certificate revoked by CRL"

// crlWorld is a client and a server with a ztunnel each, a pod that finds out what
// certificate a ztunnel shows, and a path for the CRL that one node's ztunnel
// follows.
type crlWorld struct {
	*mesh
	client, server, probe *pod
	crl                   string
}

func newCRLWorld(t *testing.T, follows int) *crlWorld {
	t.Helper()
	m := newMesh(t)
	w := &crlWorld{m, m.pod(t, "client", local), m.pod(t, "server", remote), m.uncaptured(t, "probe", remote), filepath.Join(m.dir, "crl", "crl.pem")}
	w.probe.hbone = true
	if err := os.Mkdir(filepath.Dir(w.crl), 0o755); err != nil {
		t.Fatal(err)
	}
	n := m.nodes[follows]
	n.Env = append(n.Env, "CRL_PATH="+w.crl)
	m.write(t, m.config())
	return w
}

// clientCertificate is what the client's ztunnel shows.
func (w *crlWorld) clientCertificate(t *testing.T) *x509.Certificate {
	t.Helper()
	s := w.probe.waypointServer(t)
	w.client.request(t, w.probe.At(8080), "waypoint\n"+hello)
	return s.peer(t)
}

// serverCertificate is what the server's ztunnel shows.
func (w *crlWorld) serverCertificate(t *testing.T) *x509.Certificate {
	t.Helper()
	return w.probe.dialTunnel(t, w.server).tls.ConnectionState().PeerCertificates[0]
}

// The server's ztunnel does not accept a client whose certificate has been revoked.
func crlInboundRejects(t *testing.T) {
	w := newCRLWorld(t, remote)
	w.client.node.start(t)
	testCA().revoke(t, w.crl, w.clientCertificate(t))
	w.server.node.start(t)
	w.server.echoTwice(t)
	w.client.isRefused(t, w.server.At(8080))
	got := w.server.node.line(t, "connection failed")
	if !strings.Contains(got, `direction="inbound" error="tls handshake error: `) || !strings.HasSuffix(got, `: certificate revoked by CRL"`) {
		t.Errorf("the server's side says %s", got)
	}
	got = w.client.node.line(t, "dst.addr="+w.server.At(15008).String())
	if !strings.HasPrefix(got, "error ") || !strings.Contains(got, ` bytes_sent=0 bytes_recv=0 duration="…" error="io error: `) {
		t.Errorf("the client's side says %s", got)
	}
}

// The client's ztunnel does not accept a server whose certificate has been revoked.
func crlOutboundRejects(t *testing.T) {
	w := newCRLWorld(t, local)
	w.server.node.start(t)
	testCA().revoke(t, w.crl, w.serverCertificate(t))
	w.client.node.start(t)
	w.server.echoTwice(t)
	w.client.isRefused(t, w.server.At(8080))
	got := w.client.node.line(t, "connection complete")
	if !strings.HasPrefix(got, "error ") || !strings.Contains(got, ` bytes_sent=0 bytes_recv=0 duration="…" error="io error: `) ||
		!strings.HasSuffix(got, `: certificate revoked by CRL"`) {
		t.Errorf("the client's side says %s", got)
	}
}

// crlInboundTerminates: the server's ztunnel ends a tunnel that stands when the
// client's certificate is revoked. A CRL that names others before that is no reason.
func crlInboundTerminates(t *testing.T) {
	w := newCRLWorld(t, remote)
	testCA().revoke(t, w.crl)
	w.client.node.start(t)
	w.server.node.start(t)
	w.server.echoTwice(t)
	c := w.client.Dial(t, w.server.At(8080))
	talks(t, c)
	testCA().revoke(t, w.crl, w.clientCertificate(t))
	breaks(t, c)
	_, in := direct(w.client, w.server)
	in.err = revokedText
	w.server.node.says(t, in)
	w.client.isRefused(t, w.server.At(8080))
}

// crlOutboundTerminates: the same of the client's ztunnel and the server's
// certificate.
func crlOutboundTerminates(t *testing.T) {
	w := newCRLWorld(t, local)
	testCA().revoke(t, w.crl)
	w.client.node.start(t)
	w.server.node.start(t)
	w.server.echoTwice(t)
	c := w.client.Dial(t, w.server.At(8080))
	talks(t, c)
	testCA().revoke(t, w.crl, w.serverCertificate(t))
	breaks(t, c)
	out, _ := direct(w.client, w.server)
	out.err = revokedText
	w.client.node.says(t, out)
	w.client.isRefused(t, w.server.At(8080))
}

package mesh

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"io"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"ambient-emulator/internal/worldtest"
)

// tunnel is one end of HBONE without ztunnel: who speaks it is a pod's own
// application. It does no more than the tests need, so that what goes wrong is ours.
type tunnel struct {
	*http2.Framer
	tls  *tls.Conn
	text bytes.Buffer
	enc  *hpack.Encoder
}

func newTunnel(c *tls.Conn) *tunnel {
	n := &tunnel{Framer: http2.NewFramer(c, c), tls: c}
	n.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	n.enc = hpack.NewEncoder(&n.text)
	return n
}

// headers writes a block of headers; kv are names and values.
func (n *tunnel) headers(stream uint32, end bool, kv ...string) error {
	n.text.Reset()
	for i := 0; i < len(kv); i += 2 {
		if err := n.enc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]}); err != nil {
			return err
		}
	}
	return n.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: n.text.Bytes(), EndHeaders: true, EndStream: end})
}

// next reads frames, and answers those about the connection, up to the next that
// is about a stream.
func (n *tunnel) next() (http2.Frame, error) {
	for {
		f, err := n.ReadFrame()
		if err != nil {
			return nil, err
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				err = n.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				err = n.WritePing(true, f.Data)
			}
		case *http2.WindowUpdateFrame:
		default:
			return f, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// dialTunnel makes a tunnel from a pod, which must go well: from here on it is
// certain who is at the other end.
func (p *pod) dialTunnel(t *testing.T, to *pod) *tunnel {
	t.Helper()
	c := tls.Client(p.Dial(t, to.At(15008)), testCA().tlsConfig(t, p))
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	if id := c.ConnectionState().PeerCertificates[0].URIs[0].String(); id != to.identity() {
		t.Errorf("at %s's 15008 there is %s", to.Name, id)
	}
	n := newTunnel(c)
	if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	if err := n.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return n
}

// connect asks for a connection in the tunnel, and returns the status and the
// headers of the answer.
func (n *tunnel) connect(t *testing.T, stream uint32, authority string) (status string, h *http2.MetaHeadersFrame) {
	t.Helper()
	if err := n.headers(stream, false, ":method", "CONNECT", ":authority", authority); err != nil {
		t.Fatal(err)
	}
	f, err := n.next()
	if err != nil {
		t.Fatal(err)
	}
	h, ok := f.(*http2.MetaHeadersFrame)
	if !ok {
		t.Fatalf("CONNECT is answered by %v", f)
	}
	return h.PseudoValue("status"), h
}

// talks is a request to an echo-twice server on an open stream, and its answer.
func (n *tunnel) talks(t *testing.T, stream uint32) {
	t.Helper()
	if err := n.WriteData(stream, true, []byte(hello)); err != nil {
		t.Fatal(err)
	}
	var got []byte
	for ended := false; !ended; {
		f, err := n.next()
		if err != nil {
			t.Fatal(err)
		}
		d, ok := f.(*http2.DataFrame)
		if !ok {
			t.Fatalf("got %v in place of the answer", f)
		}
		got, ended = append(got, d.Data()...), d.StreamEnded()
	}
	if string(got) != hello+hello {
		t.Errorf("the answer is %q", got)
	}
}

func header(h *http2.MetaHeadersFrame, name string) string {
	for _, f := range h.RegularFields() {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}

// hboneServer is a waypoint without ztunnel. It says "waypoint\n", then everything
// once, and remembers what it was asked for.
type hboneServer struct {
	config *tls.Config

	mu       sync.Mutex
	requests []connectRequest
	peers    []*x509.Certificate
}

type connectRequest struct {
	authority, baggage, forwarded, traceparent string
	peer                                       string
}

const waypointBaggage = "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=waypoint,service.name=waypoint"

// waypointServer is the pod's own server on 15008.
func (p *pod) waypointServer(t *testing.T) *hboneServer {
	t.Helper()
	s := &hboneServer{config: testCA().tlsConfig(t, p)}
	p.Serve(t, p.At(15008), s.handle)
	return s
}

// asked returns the requests so far.
func (s *hboneServer) asked() []connectRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests
}

// peer returns the certificate of the last who has come.
func (s *hboneServer) peer(t *testing.T) *x509.Certificate {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.peers) == 0 {
		t.Fatal("nobody has come")
	}
	return s.peers[len(s.peers)-1]
}

func (s *hboneServer) handle(raw *worldtest.Conn) {
	raw.SetDeadline(time.Now().Add(worldtest.Patience))
	c := tls.Server(raw, s.config)
	if c.Handshake() != nil {
		return
	}
	peer := c.ConnectionState().PeerCertificates[0]
	s.mu.Lock()
	s.peers = append(s.peers, peer)
	s.mu.Unlock()
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(c, preface); err != nil || string(preface) != http2.ClientPreface {
		return
	}
	n := newTunnel(c)
	if n.WriteSettings() != nil {
		return
	}
	for {
		f, err := n.next()
		if err != nil {
			return
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			s.mu.Lock()
			s.requests = append(s.requests, connectRequest{
				f.PseudoValue("authority"), header(f, "baggage"), header(f, "forwarded"), header(f, "traceparent"), peer.URIs[0].String(),
			})
			s.mu.Unlock()
			err = n.headers(f.StreamID, false, ":status", "200", "baggage", waypointBaggage)
			if err == nil {
				err = n.WriteData(f.StreamID, false, []byte("waypoint\n"))
			}
		case *http2.DataFrame:
			err = n.WriteData(f.StreamID, f.StreamEnded(), f.Data())
		}
		if err != nil {
			return
		}
	}
}

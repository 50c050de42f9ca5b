package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// ALPN is the one protocol of a tunnel.
const ALPN = "h2"

// noSuchProtocol is what nobody offers; see serverConfig.
const noSuchProtocol = "h2, and you did not offer it"

// ClientConfig returns the configuration of a client that is own and wants one of
// expected at the other end. It serves any number of connections: each handshake
// takes the certificate that is current. Whether the server accepts ours shows
// with the first read: a TLS 1.3 client is done before the server has judged it.
// Who wants to dial only with a certificate at hand calls Certificate first.
func (m *Manager) ClientConfig(own ID, expected []ID) *tls.Config {
	expected = slices.Clone(expected)
	c := m.baseConfig()
	c.GetClientCertificate = func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		cert, err := m.Certificate(info.Context(), own)
		if err != nil {
			return nil, err
		}
		return &cert.TLS, nil
	}
	// crypto/tls verifies a server by its DNS name or IP address, and a workload
	// has neither in its certificate. So we switch that off and do all of it here:
	// chain, validity, key usage, and the identity in the name's place. No server
	// name means no SNI as well.
	c.InsecureSkipVerify = true
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		cert, err := m.Certificate(m.ctx, own)
		if err != nil {
			return err
		}
		if err := verifyChain(cs.PeerCertificates, cert, x509.ExtKeyUsageServerAuth); err != nil {
			return err
		}
		if err := m.checkIDs(cs, wantIDs(expected)); err != nil {
			return err
		}
		return m.opts.CRL.Check(cs.PeerCertificates)
	}
	return c
}

// ServerConfig returns the configuration of a server that is own and lets in
// whoever is of its trust domain. It serves any number of connections: each
// handshake takes the certificate that is current.
func (m *Manager) ServerConfig(own ID) *tls.Config {
	c := m.baseConfig()
	c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		cert, err := m.Certificate(hello.Context(), own)
		if err != nil {
			return nil, err
		}
		return m.serverConfig(cert, hello), nil
	}
	return c
}

// serverConfig is for one handshake, as in ztunnel. The roots come with the
// certificate, so crypto/tls can verify the client and find the right alert.
func (m *Manager) serverConfig(cert *Certificate, hello *tls.ClientHelloInfo) *tls.Config {
	c := m.baseConfig()
	c.Certificates = []tls.Certificate{cert.TLS}
	c.ClientAuth = tls.RequireAndVerifyClientCert // with EKU clientAuth
	c.ClientCAs = cert.pool
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := m.checkIDs(cs, wantDomain(cert.ID.TrustDomain)); err != nil {
			return err
		}
		return m.opts.CRL.Check(cs.PeerCertificates)
	}
	// To a client that offers HTTP/1.1 and not h2 crypto/tls would be kind, as if
	// it had offered nothing (golang/go#46310). rustls is not: no overlap, no
	// connection. A protocol that can't overlap gets the client the right alert.
	if len(hello.SupportedProtos) > 0 && !slices.Contains(hello.SupportedProtos, ALPN) {
		c.NextProtos = []string{noSuchProtocol}
	}
	return c
}

// baseConfig is what both sides have in common. The suites of TLS 1.3 are not
// ours to choose in Go: it has ChaCha20 besides ztunnel's two of AES-GCM, and
// prefers AES-128.
func (m *Manager) baseConfig() *tls.Config {
	c := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{ALPN},
		SessionTicketsDisabled: true, // each connection proves itself anew
		// Full records from the first byte: what runs in here is bulk data, and the
		// small ones that are meant for a browser's first page cost throughput.
		DynamicRecordSizingDisabled: true,
	}
	if m.opts.TLS12 {
		c.MinVersion = tls.VersionTLS12
		c.CipherSuites = []uint16{
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
		}
	}
	if m.opts.PQC {
		c.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768}
	}
	return c
}

// Handshake runs c's handshake, and says in its error who the peer claimed to be
// when crypto/tls itself refused the certificate.
func Handshake(ctx context.Context, c *tls.Conn) error {
	err := c.HandshakeContext(ctx)
	var verr *tls.CertificateVerificationError
	var perr *PeerError
	if errors.As(err, &verr) && !errors.As(err, &perr) {
		return &PeerError{Peer: verr.UnverifiedCertificates, Err: err}
	}
	return err
}

// PeerError says that a peer showed a certificate that we do not accept.
type PeerError struct {
	Peer []*x509.Certificate // as sent, leaf first
	Err  error
}

func (e *PeerError) Error() string { return fmt.Sprintf("peer %s: %v", describe(e.Peer), e.Err) }
func (e *PeerError) Unwrap() error { return e.Err }

// maxDescribed bounds what a stranger can write into our log.
const maxDescribed = 400 // bytes

// describe says who a chain claims to be; the claim may be false.
func describe(chain []*x509.Certificate) string {
	if len(chain) == 0 {
		return "without a certificate"
	}
	uris := uriSANs(chain[0])
	if len(uris) == 0 {
		return "without a URI SAN"
	}
	return list(uris)
}

func list(uris []string) string {
	text := strings.Join(uris, " and ")
	if len(text) > maxDescribed {
		text = text[:maxDescribed] + "…" // URI SANs are ASCII
	}
	return text
}

// verifyChain checks chain against the roots that came with our own certificate.
func verifyChain(chain []*x509.Certificate, own *Certificate, usage x509.ExtKeyUsage) error {
	if len(chain) == 0 {
		return &PeerError{Err: errors.New("not accepted")}
	}
	inter := x509.NewCertPool()
	for _, cert := range chain[1:] {
		inter.AddCert(cert)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: own.pool, Intermediates: inter, KeyUsages: []x509.ExtKeyUsage{usage},
	})
	if err != nil {
		return &PeerError{Peer: chain, Err: &tls.CertificateVerificationError{UnverifiedCertificates: chain, Err: err}}
	}
	return nil
}

// want is whom a peer may be.
type want struct {
	accepts func(ID) bool
	text    string
}

func wantIDs(expected []ID) want {
	text := "nobody"
	for i, id := range expected {
		if i == 0 {
			text = id.String()
		} else {
			text += " or " + id.String()
		}
	}
	return want{func(id ID) bool { return slices.Contains(expected, id) }, text}
}

func wantDomain(domain string) want {
	return want{func(id ID) bool { return id.TrustDomain == domain }, fmt.Sprintf("trust domain %q", domain)}
}

// checkIDs wants one of the peer's URI SANs to be w's; DNS names never count.
func (m *Manager) checkIDs(cs tls.ConnectionState, w want) error {
	if len(cs.PeerCertificates) == 0 {
		return &PeerError{Err: errors.New("expected " + w.text)}
	}
	ids, others := idsOf(cs.PeerCertificates[0])
	if len(others) > 0 {
		m.opts.Log.Warn("peer's SAN is no identity", "san", list(others))
	}
	if !slices.ContainsFunc(ids, w.accepts) {
		return &PeerError{Peer: cs.PeerCertificates, Err: errors.New("expected " + w.text)}
	}
	return nil
}

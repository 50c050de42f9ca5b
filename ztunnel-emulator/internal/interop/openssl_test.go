package interop

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"ambient-emulator/internal/worldtest"
	"ambient-emulator/ztunnel-emulator/internal/identity/identitytest"
)

// TestOpenSSL: openssl s_client at 15008, which waits for the end after its
// handshake: with TLS 1.3 a client learns only then whether it is accepted.
func TestOpenSSL(t *testing.T) {
	t.Parallel()
	served, from := newPod(t, 2, "server"), newPod(t, 3, "client")
	n := newNode(t, served)
	n.start(t, served)
	client := func(args ...string) string {
		cmd := worldtest.Command(from.NS, "openssl", slices.Concat([]string{"s_client", "-connect", served.At(15008).String(), "-CAfile", n.ca.root(), "-verify_return_error"}, args)...)
		cmd.Stdin = strings.NewReader("HTTP/1.1 is not what is spoken here\r\n") // so we are hung up on
		out, _ := cmd.CombinedOutput()                                           // with an alert it is an error
		return string(out)
	}
	pem := n.ca.of(t, "client")
	own := func(more ...string) []string { return append([]string{"-cert", pem, "-key", pem, "-ign_eof"}, more...) }
	h2 := func(more ...string) []string { return append(own("-alpn", "h2"), more...) }
	for _, tc := range []struct {
		name string
		args []string
		want []string // parts of what is printed
		not  []string
	}{
		{"h2", h2(), []string{"New, TLSv1.3, Cipher is TLS_AES_", "ALPN protocol: h2", "Verification: OK", "Verify return code: 0 (ok)", "Acceptable client certificate CA names\nO = cluster.local"}, []string{"alert"}},
		{"no ALPN", own(), []string{"New, TLSv1.3", "No ALPN negotiated"}, []string{"alert"}},
		{"AES-256", h2("-ciphersuites", "TLS_AES_256_GCM_SHA384"), []string{"Cipher is TLS_AES_256_GCM_SHA384"}, []string{"alert"}},
		{"AES-128", h2("-ciphersuites", "TLS_AES_128_GCM_SHA256"), []string{"Cipher is TLS_AES_128_GCM_SHA256"}, []string{"alert"}},
		{"P-384", h2("-groups", "P-384"), []string{"Server Temp Key: ECDH, secp384r1"}, []string{"alert"}},
		{"SNI", h2("-servername", "somebody.else"), []string{"Verify return code: 0 (ok)"}, []string{"alert"}},
		{"no tickets", h2(), nil, []string{"Post-Handshake New Session Ticket", "alert"}},
		{"HTTP/1.1", own("-alpn", "http/1.1"), []string{"alert no application protocol"}, nil},
		{"HTTP/1.1 and h2", own("-alpn", "http/1.1,h2"), []string{"ALPN protocol: h2"}, []string{"alert"}},
		{"TLS 1.2", h2("-tls1_2"), []string{"alert protocol version"}, nil},
		{"TLS 1.1", h2("-tls1_1", "-cipher", "ALL:@SECLEVEL=0"), []string{"alert protocol version"}, nil},
		{"no certificate", []string{"-alpn", "h2", "-ign_eof"}, []string{"alert certificate required"}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			out := client(tc.args...)
			for _, part := range tc.want {
				if !strings.Contains(out, part) {
					t.Errorf("openssl has not said %q, but\n%s", part, out)
				}
			}
			for _, part := range tc.not {
				if strings.Contains(out, part) {
					t.Errorf("openssl has said %q:\n%s", part, out)
				}
			}
		})
	}
	t.Run("certificate", func(t *testing.T) {
		t.Parallel()
		out := client(h2()...)
		if n := strings.Count(out, "BEGIN CERTIFICATE"); n != 1 {
			t.Errorf("%d certificates:\n%s", n, out)
		}
		cmd := exec.Command("openssl", "x509", "-noout", "-text")
		cmd.Stdin = strings.NewReader(out)
		text, err := cmd.Output()
		must(t, err)
		_, extensions, _ := bytes.Cut(text, []byte("X509v3 extensions:"))
		got := regexp.MustCompile(`\s+`).ReplaceAllString(string(extensions), " ")
		want := " X509v3 Key Usage: critical Digital Signature, Key Encipherment X509v3 Extended Key Usage: TLS Web Server Authentication, TLS Web Client Authentication" +
			" X509v3 Subject Alternative Name: URI:" + idOf("server").String() + " Signature Algorithm: sha256WithRSAEncryption "
		if !strings.HasPrefix(got, want) {
			t.Errorf("the extensions are\n%s\nwant\n%s", got, want)
		}
	})
	// Python lets nobody show a certificate whose key is not its own, nor one of
	// two that makes no chain; openssl does.
	t.Run("a chain of others", func(t *testing.T) {
		t.Parallel()
		other := newCA(t)
		leaf := other.sign(t, identitytest.Good(idOf("client")))
		out := client("-cert", leaf, "-key", leaf, "-cert_chain", n.ca.root(), "-ign_eof", "-alpn", "h2")
		if !strings.Contains(out, "alert unknown ca") {
			t.Errorf("openssl has said\n%s", out)
		}
	})
	t.Run("the root as the client", func(t *testing.T) {
		t.Parallel()
		out := client("-cert", n.ca.root(), "-key", filepath.Join(n.ca.dir, "key.pem"), "-ign_eof", "-alpn", "h2")
		if !strings.Contains(out, "alert bad certificate") {
			t.Errorf("openssl has said\n%s", out)
		}
	})
}

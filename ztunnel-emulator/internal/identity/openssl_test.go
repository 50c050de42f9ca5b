package identity_test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	. "ambient-emulator/ztunnel-emulator/internal/identity"
)

// files are a certificate and its key as openssl(1) reads them.
type files struct{ root, leaf, key string }

func issueFiles(t *testing.T, ca *CA, id ID) files {
	t.Helper()
	cert, err := ca.Issue(t.Context(), id, time.Hour)
	must(t, err)
	key, err := x509.MarshalPKCS8PrivateKey(cert.TLS.PrivateKey)
	must(t, err)
	dir := t.TempDir()
	f := files{filepath.Join(dir, "root.pem"), filepath.Join(dir, "leaf.pem"), filepath.Join(dir, "key.pem")}
	must(t, os.WriteFile(f.root, []byte(encode("CERTIFICATE", ca.Roots()[0].Raw)), 0o600))
	must(t, os.WriteFile(f.leaf, []byte(encode("CERTIFICATE", cert.TLS.Certificate[0])), 0o600))
	must(t, os.WriteFile(f.key, []byte(encode("PRIVATE KEY", key)), 0o600))
	return f
}

func openssl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "openssl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestOpenSSLReads(t *testing.T) {
	ca, err := OpenCA(filepath.Join(t.TempDir(), "ca"))
	must(t, err)
	f := issueFiles(t, ca, client)
	for _, purpose := range []string{"sslclient", "sslserver"} {
		if out := openssl(t, "verify", "-purpose", purpose, "-CAfile", f.root, f.leaf); !strings.Contains(out, "OK") {
			t.Error(out)
		}
	}
	leaf := regexp.MustCompile(`\s+`).ReplaceAllString(openssl(t, "x509", "-in", f.leaf, "-noout", "-text"), " ")
	for _, want := range []string{
		"Signature Algorithm: sha256WithRSAEncryption Issuer: O = cluster.local Validity",
		"Subject: O = cluster.local Subject Public Key Info",
		"Public-Key: (256 bit)",
		"X509v3 extensions: X509v3 Key Usage: critical Digital Signature, Key Encipherment " +
			"X509v3 Extended Key Usage: TLS Web Server Authentication, TLS Web Client Authentication " +
			"X509v3 Subject Alternative Name: URI:spiffe://cluster.local/ns/default/sa/client Signature Algorithm",
	} {
		if !strings.Contains(leaf, want) {
			t.Errorf("leaf without %q:\n%s", want, leaf)
		}
	}
	root := regexp.MustCompile(`\s+`).ReplaceAllString(openssl(t, "x509", "-in", f.root, "-noout", "-text"), " ")
	for _, want := range []string{
		"Issuer: O = cluster.local Validity", "Subject: O = cluster.local Subject", "Public-Key: (2048 bit)",
		"X509v3 Key Usage: critical Certificate Sign, CRL Sign", "X509v3 Basic Constraints: critical CA:TRUE",
	} {
		if !strings.Contains(root, want) {
			t.Errorf("root without %q:\n%s", want, root)
		}
	}
}

// OpenSSL's client at our server.
func TestOpenSSLClient(t *testing.T) {
	ca, err := OpenCA(filepath.Join(t.TempDir(), "ca"))
	must(t, err)
	m := NewManager(ca, Options{})
	defer m.Close()
	f := issueFiles(t, ca, client)

	for _, tt := range []struct {
		name   string
		args   []string
		accept bool
		want   string
	}{
		{"good", []string{"-cert", f.leaf, "-key", f.key, "-alpn", "h2"}, true, "ALPN protocol: h2"},
		{"no ALPN", []string{"-cert", f.leaf, "-key", f.key}, true, "No ALPN negotiated"},
		{"SNI", []string{"-cert", f.leaf, "-key", f.key, "-servername", "example.com"}, true, "TLSv1.3, Cipher is TLS_A"},
		{"AES-256 alone", []string{"-cert", f.leaf, "-key", f.key, "-ciphersuites", "TLS_AES_256_GCM_SHA384"}, true, "Cipher is TLS_AES_256_GCM_SHA384"},
		{"P-384", []string{"-cert", f.leaf, "-key", f.key, "-groups", "P-384"}, true, "Verify return code: 0 (ok)"},
		{"no certificate", nil, false, "certificate required"},
		{"other ALPN", []string{"-cert", f.leaf, "-key", f.key, "-alpn", "http/1.1"}, false, "no application protocol"},
		{"TLS 1.2", []string{"-cert", f.leaf, "-key", f.key, "-tls1_2"}, false, "protocol version"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			must(t, err)
			defer l.Close()
			done := make(chan end, 1)
			go func() { done <- greet(l, m.ServerConfig(server)) }()
			args := append([]string{"s_client", "-connect", l.Addr().String(), "-CAfile", f.root, "-verify_return_error"}, tt.args...)
			cmd := exec.CommandContext(t.Context(), "openssl", args...)
			in, err := cmd.StdinPipe() // open: s_client ends at its input's end or the server's
			must(t, err)
			defer in.Close()
			out, err := cmd.CombinedOutput()
			s := <-done
			if !strings.Contains(string(out), tt.want) || tt.accept != (err == nil && s.err == nil) {
				t.Errorf("openssl: %v; server: %v\n%s", err, s.err, out)
			}
			if id, _ := PeerID(s.cs); tt.accept && (id != client || !strings.Contains(string(out), "hello from Go")) {
				t.Errorf("peer %v\n%s", id, out)
			}
			if strings.Contains(string(out), "New Session Ticket") || strings.Contains(string(out), "Post-Handshake") {
				t.Errorf("a session ticket:\n%s", out)
			}
		})
	}
}

// greet serves one connection: a handshake, a line, and the end.
func greet(l net.Listener, config *tls.Config) end {
	conn, err := l.Accept()
	if err != nil {
		return end{err: err}
	}
	c := tls.Server(conn, config)
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if err := c.Handshake(); err != nil {
		return end{err: err}
	}
	_, err = c.Write([]byte("hello from Go\n"))
	return end{c.ConnectionState(), err}
}

// Our client at OpenSSL's server.
func TestOpenSSLServer(t *testing.T) {
	ca, err := OpenCA(filepath.Join(t.TempDir(), "ca"))
	must(t, err)
	m := NewManager(ca, Options{})
	defer m.Close()
	f := issueFiles(t, ca, server)

	for _, tt := range []struct {
		name     string
		args     []string
		expected ID
		want     string // in our error; none is none
	}{
		{"good", []string{"-alpn", "h2"}, server, ""},
		{"no ALPN", nil, server, ""},
		{"somebody else", []string{"-alpn", "h2"}, other, "peer spiffe://cluster.local/ns/default/sa/server: expected spiffe://cluster.local/ns/default/sa/other"},
		{"TLS 1.2", []string{"-tls1_2"}, server, "protocol version"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			args := append([]string{"s_server", "-accept", "127.0.0.1:0", "-naccept", "1", "-rev", "-Verify", "1", "-verify_return_error", "-CAfile", f.root, "-cert", f.leaf, "-key", f.key}, tt.args...)
			cmd := exec.CommandContext(t.Context(), "openssl", args...)
			stdout, err := cmd.StdoutPipe()
			must(t, err)
			cmd.Stderr = cmd.Stdout
			in, err := cmd.StdinPipe()
			must(t, err)
			defer in.Close()
			must(t, cmd.Start())
			out := bufio.NewReader(stdout)
			addr := ""
			for addr == "" {
				line, err := out.ReadString('\n')
				if err != nil {
					t.Fatalf("openssl s_server ended: %v", err)
				}
				fmt.Sscanf(line, "ACCEPT %s", &addr)
			}
			conn, err := net.Dial("tcp", addr)
			must(t, err)
			c := exchangeLine(tls.Client(conn, m.ClientConfig(client, []ID{tt.expected})))
			text, _ := io.ReadAll(out)
			cmd.Wait()
			if tt.want == "" && c.err != nil || tt.want != "" && (c.err == nil || !strings.Contains(c.err.Error(), tt.want)) {
				t.Errorf("client: %v, want %q\n%s", c.err, tt.want, text)
			}
			if id, _ := PeerID(c.cs); c.err == nil && id != server {
				t.Errorf("peer %v", id)
			}
		})
	}
}

// exchangeLine sends a line to who sends it back reversed, and closes c.
func exchangeLine(c *tls.Conn) end {
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if err := c.Handshake(); err != nil {
		return end{err: err}
	}
	_, err := c.Write([]byte("olleh\n"))
	if err != nil {
		return end{err: err}
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && line != "hello\n" {
		err = fmt.Errorf("the server said %q", line)
	}
	return end{c.ConnectionState(), err}
}

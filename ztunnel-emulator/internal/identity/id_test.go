package identity_test

import (
	"crypto/tls"
	"crypto/x509"
	"testing"
	"time"

	. "ambient-emulator/ztunnel-emulator/internal/identity"
	"ambient-emulator/ztunnel-emulator/internal/identity/identitytest"
)

func TestParseID(t *testing.T) {
	for _, tt := range []struct {
		text string
		want ID
	}{
		{"spiffe://cluster.local/ns/default/sa/web", ID{"cluster.local", "default", "web"}},
		{"spiffe:///ns/default/sa/web", ID{"", "default", "web"}},
		{"spiffe:///ns//sa/", ID{}},
		{"spiffe://ns/ns/ns/sa/sa", ID{"ns", "ns", "sa"}},
		{"spiffe://td:80/ns/a%2Fb/sa/c?d#e", ID{"td:80", "a%2Fb", "c?d#e"}},
	} {
		got, err := ParseID(tt.text)
		if err != nil || got != tt.want {
			t.Errorf("ParseID(%q) = %#v, %v", tt.text, got, err)
		}
		if s := tt.want.String(); s != tt.text {
			t.Errorf("%#v prints as %q, want %q", tt.want, s, tt.text)
		}
	}
	for _, text := range []string{
		"", "spiffe://", "cluster.local/ns/default/sa/web", "SPIFFE://cluster.local/ns/default/sa/web",
		"https://cluster.local/ns/default/sa/web", "spiffe:/cluster.local/ns/default/sa/web",
		"spiffe://cluster.local/ns/default/sa", "spiffe://cluster.local/ns/default/sa/web/",
		"spiffe://cluster.local/ns/default/sa/web/more", "spiffe://cluster.local/NS/default/sa/web",
		"spiffe://cluster.local/ns/default/SA/web", "spiffe://cluster.local/sa/web/ns/default",
		" spiffe://cluster.local/ns/default/sa/web",
	} {
		if got, err := ParseID(text); err == nil {
			t.Errorf("ParseID(%q) = %#v, want an error", text, got)
		}
	}
}

// What parses prints as it was.
func FuzzParseID(f *testing.F) {
	f.Add("spiffe://cluster.local/ns/default/sa/web")
	f.Add("spiffe:///ns//sa/")
	f.Add("spiffe://a/ns/b/sa/c/")
	f.Fuzz(func(t *testing.T, text string) {
		if id, err := ParseID(text); err == nil && id.String() != text {
			t.Errorf("%q parses as %#v and prints as %q", text, id, id.String())
		}
	})
}

// An identity comes back out of a certificate as it went in, or does not go in.
func FuzzIssue(f *testing.F) {
	ca := identitytest.NewCA(f)
	f.Add("cluster.local", "default", "web")
	f.Add("", "", "")
	f.Add("td", "a b", "%2F%zz")
	f.Add("td:80", "a%2Fb", "c?d#e")
	f.Add("ü", "/", "\x00")
	f.Fuzz(func(t *testing.T, domain, namespace, account string) {
		id := ID{domain, namespace, account}
		cert, err := ca.Issue(t.Context(), id, time.Hour)
		if err != nil {
			return
		}
		cs := tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert.TLS.Leaf}}
		if got, ok := PeerID(cs); !ok || got != id {
			t.Errorf("%#v went in, %#v came out", id, got)
		}
	})
}

func TestPeerIDOfNobody(t *testing.T) {
	if id, ok := PeerID(tls.ConnectionState{}); ok {
		t.Errorf("a peer without a certificate is %v", id)
	}
	cert := identitytest.NewCA(t).Sign(t, identitytest.NoSAN())
	if id, ok := PeerID(tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert.Leaf}}); ok {
		t.Errorf("a certificate without a SAN is %v", id)
	}
}

// Package identity says who a workload is and proves it: SPIFFE identities, a
// local CA that certifies them, a Manager that keeps each local workload's
// certificate fresh, and the TLS configurations of both ends of a tunnel.
//
// The CA stands in for istiod, or for ztunnel's own test CA (FAKE_CA), and its
// certificates have the latter's shape: reference/hbone.md, sections 1 to 1.2.
package identity

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"strings"
)

// ID is who a workload is: spiffe://TrustDomain/ns/Namespace/sa/ServiceAccount.
// Each of the three may be empty: a local configuration without a trust domain
// gives spiffe:///ns/….
type ID struct {
	TrustDomain    string
	Namespace      string
	ServiceAccount string
}

const scheme = "spiffe://"

// ParseID reads the form that String prints, and only that.
func ParseID(s string) (ID, error) {
	rest, ok := strings.CutPrefix(s, scheme)
	parts := strings.Split(rest, "/")
	if !ok || len(parts) != 5 || parts[1] != "ns" || parts[3] != "sa" {
		return ID{}, fmt.Errorf("%q is no identity: want spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT", s)
	}
	return ID{TrustDomain: parts[0], Namespace: parts[2], ServiceAccount: parts[4]}, nil
}

func (id ID) String() string {
	return scheme + id.TrustDomain + "/ns/" + id.Namespace + "/sa/" + id.ServiceAccount
}

// PeerID returns who the peer of a finished handshake is: the first URI SAN of
// its certificate that is an identity.
func PeerID(cs tls.ConnectionState) (ID, bool) {
	if len(cs.PeerCertificates) == 0 {
		return ID{}, false
	}
	ids, _ := idsOf(cs.PeerCertificates[0])
	if len(ids) == 0 {
		return ID{}, false
	}
	return ids[0], true
}

// idsOf returns the identities in a certificate, and the URI SANs that are none.
func idsOf(cert *x509.Certificate) (ids []ID, others []string) {
	for _, uri := range uriSANs(cert) {
		if id, err := ParseID(uri); err == nil {
			ids = append(ids, id)
		} else {
			others = append(others, uri)
		}
	}
	return ids, others
}

var (
	oidSAN = asn1.ObjectIdentifier{2, 5, 29, 17}

	// What RFC 5280, 4.2.1.6, calls uniformResourceIdentifier.
	uriTag = asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6}
)

// uriSANs returns the URI SANs as they stand in the certificate. x509 offers
// them as parsed URLs, which print escaped, and identities are compared exactly.
func uriSANs(cert *x509.Certificate) []string {
	var uris []string
	for _, ext := range cert.Extensions {
		if !ext.Id.Equal(oidSAN) {
			continue
		}
		var names []asn1.RawValue
		if _, err := asn1.Unmarshal(ext.Value, &names); err != nil {
			continue // x509 has refused such a certificate before
		}
		for _, name := range names {
			if name.Class == uriTag.Class && name.Tag == uriTag.Tag {
				uris = append(uris, string(name.Bytes))
			}
		}
	}
	return uris
}

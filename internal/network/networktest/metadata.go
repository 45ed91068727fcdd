package networktest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/atollvm/atoll/internal/metadata"
	"github.com/atollvm/atoll/internal/network"
)

var metadataAt = netip.AddrPortFrom(metadata.Address, metadata.Port)

// document is d as an endpoint has it.
func document(t *testing.T, d metadata.Document) json.RawMessage {
	t.Helper()
	data, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// told is what the guest's metadata service says at a path.
func (g *Guest) told(client *http.Client, method, path string, headers ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://169.254.169.254"+path, nil)
	if err != nil {
		return "", err
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK {
		return resp.Status, err
	}
	return string(body), err
}

// client keeps one connection.
func (g *Guest) client(t *testing.T) *http.Client {
	transport := &http.Transport{DialContext: g.Dial}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

const instanceID = "/latest/meta-data/instance-id"

// testMetadata has two machines with a document each and one without: each gets its own over all that befalls the network.
func testMetadata(t *testing.T, r Rig) {
	d := r.New()
	guests := map[string]*Guest{}
	endpoints := map[string]network.Endpoint{}
	for i, name := range []string{"web", "db", "none"} {
		e := Endpoint(t, byte(2+i), name)
		if name != "none" {
			e.Metadata = document(t, metadata.Document{InstanceID: "i-" + name})
		}
		endpoints[name] = e
		guests[name] = Boot(t, Net, e, Attach(t, d, e))
	}
	ask := func(name, method, path string, headers ...string) string {
		t.Helper()
		said, err := guests[name].told(guests[name].client(t), method, path, headers...)
		if err != nil {
			t.Errorf("%s: %s %s: %v", name, method, path, err)
		}
		return said
	}
	const ttl, header = "X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"
	if got := ask("web", "GET", instanceID); !strings.HasPrefix(got, "401 ") {
		t.Errorf("without a token: %s", got)
	}
	tokens := map[string]string{"web": ask("web", "PUT", "/latest/api/token", ttl, "60"), "db": ask("db", "PUT", "/latest/api/token", ttl, "60")}
	for name, token := range tokens {
		if got := ask(name, "GET", instanceID, header, token); got != "i-"+name {
			t.Errorf("%s: %s", name, got)
		}
	}
	if got := ask("web", "GET", instanceID, header, tokens["db"]); !strings.HasPrefix(got, "401 ") {
		t.Errorf("with the token of another machine: %s", got)
	}
	if got, err := guests["none"].told(guests["none"].client(t), "GET", instanceID); err == nil {
		t.Errorf("a machine without metadata got %s", got)
	}

	// A new document takes effect at once, and nothing breaks: neither the token nor the connection.
	web := guests["web"].client(t)
	if _, err := guests["web"].told(web, "GET", instanceID, header, tokens["web"]); err != nil {
		t.Fatal(err)
	}
	web.Transport.(*http.Transport).DialContext = nil // it has its connection
	e := endpoints["web"]
	e.Metadata = document(t, metadata.Document{InstanceID: "i-changed"})
	Attach(t, d, e)
	if got, err := guests["web"].told(web, "GET", instanceID, header, tokens["web"]); got != "i-changed" {
		t.Errorf("after a change: %s, %v", got, err)
	}
	// The driver brings the documents back with the helper.
	r.Crash(Net)
	eventually(t, func() error {
		token, err := guests["web"].told(guests["web"].client(t), "PUT", "/latest/api/token", ttl, "60")
		if err != nil {
			return err
		}
		got, err := guests["web"].told(guests["web"].client(t), "GET", instanceID, header, token)
		if err != nil || got != "i-changed" {
			return fmt.Errorf("after a crash: %s, %w", got, err)
		}
		return nil
	})
	e.Metadata = nil
	Attach(t, d, e)
	if got, err := guests["web"].told(guests["web"].client(t), "GET", instanceID); err == nil {
		t.Errorf("metadata that was taken away: %s", got)
	}
}

// testMetadataSpoofing has a machine that asks in its neighbour's name.
func testMetadataSpoofing(t *testing.T, r Rig) {
	d := r.New()
	evil, victim := Endpoint(t, 2, "evil"), Endpoint(t, 3, "victim")
	evil.Metadata = document(t, metadata.Document{InstanceID: "i-evil", V1: true})
	victim.Metadata = document(t, metadata.Document{InstanceID: "i-victim", V1: true})
	w := Plug(t, Attach(t, d, evil))
	v := Plug(t, Attach(t, d, victim))
	mac, vmac := mustMAC(t, evil.MAC), mustMAC(t, victim.MAC)
	w.Send(arpRequest(mac, evil.Address, metadata.Address)) // as on a link without a route
	reply := w.Receive(2*time.Second, isARPReply)
	if reply == nil {
		t.Fatal("no ARP reply for the metadata service")
	}
	gateway := net.HardwareAddr(header.ARP(reply[14:]).HardwareAddressSender())
	syn := func(from netip.Addr) []byte {
		s := header.TCP(make([]byte, header.TCPMinimumSize))
		s.Encode(&header.TCPFields{SrcPort: 4000, DstPort: metadataAt.Port(), SeqNum: 1, DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagSyn, WindowSize: 1 << 15})
		sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, tcpip.AddrFrom4(from.As4()), tcpip.AddrFrom4(metadata.Address.As4()), uint16(len(s)))
		s.SetChecksum(^s.CalculateChecksum(sum))
		return ipPacket(header.TCPProtocolNumber, from, metadata.Address, s)
	}
	answered := func(frame []byte) bool { return len(frame) > 23 && frame[23] == byte(header.TCPProtocolNumber) }
	for name, frame := range map[string][]byte{
		"address":         ethernetFrame(gateway, mac, header.IPv4ProtocolNumber, syn(victim.Address)),
		"MAC":             ethernetFrame(gateway, vmac, header.IPv4ProtocolNumber, syn(evil.Address)),
		"MAC and address": ethernetFrame(gateway, vmac, header.IPv4ProtocolNumber, syn(victim.Address)),
		"the gateway":     ethernetFrame(gateway, mac, header.IPv4ProtocolNumber, syn(Net.Gateway)),
		"the service":     ethernetFrame(gateway, mac, header.IPv4ProtocolNumber, syn(metadata.Address)),
	} {
		w.Send(frame)
		if w.Receive(50*time.Millisecond, answered) != nil || v.Receive(50*time.Millisecond, answered) != nil {
			t.Errorf("%s: a forged request was answered", name)
		}
	}
	w.Send(ethernetFrame(gateway, mac, header.IPv4ProtocolNumber, syn(evil.Address)))
	if w.Receive(2*time.Second, answered) == nil {
		t.Error("an honest request was not answered")
	}
	// Nor may it play the service to its neighbours.
	w.Send(ethernetFrame(vmac, mac, header.IPv4ProtocolNumber, syn(metadata.Address)))
	w.Send(arpRequest(mac, metadata.Address, victim.Address))
	if v.Receive(50*time.Millisecond, func([]byte) bool { return true }) != nil {
		t.Error("a machine speaks as the metadata service")
	}
}

// testMetadataHoarder has a machine that opens connections and says nothing.
func testMetadataHoarder(t *testing.T, r Rig) {
	d := r.New()
	hoarder, web := Endpoint(t, 2, "hoarder"), Endpoint(t, 3, "web")
	hoarder.Metadata = document(t, metadata.Document{InstanceID: "i-hoarder", V1: true})
	web.Metadata = document(t, metadata.Document{InstanceID: "i-web", V1: true})
	g := Boot(t, Net, hoarder, Attach(t, d, hoarder))
	gw := Boot(t, Net, web, Attach(t, d, web))
	var open []net.Conn
	for range 40 {
		c, err := g.Dial(t.Context(), "tcp", metadataAt.String())
		if err == nil {
			open = append(open, c)
		}
	}
	if len(open) != 32 {
		t.Errorf("%d connections of one machine are taken", len(open))
	}
	if got, err := gw.told(gw.client(t), "GET", instanceID); got != "i-web" {
		t.Errorf("its neighbour: %s, %v", got, err)
	}
	if _, err := fmt.Fprintf(open[0], "GET %s HTTP/1.1\r\nHost: 169.254.169.254\r\n", instanceID); err != nil { // and no more
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for _, c := range open {
		c.SetReadDeadline(deadline)
		if _, err := io.Copy(io.Discard, c); err != nil {
			t.Errorf("a silent connection was not ended: %v", err)
		}
		c.Close()
	}
	eventually(t, func() error {
		got, err := g.told(g.client(t), "GET", instanceID)
		if err == nil && got != "i-hoarder" {
			err = fmt.Errorf("afterwards: %s", got)
		}
		return err
	})
}

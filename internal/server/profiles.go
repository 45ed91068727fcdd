//go:build linux

package server

import (
	"context"
	"fmt"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/profile"
)

type profiles struct{ Options }

func (s *profiles) Put(_ context.Context, req *connect.Request[atollv1.PutProfileRequest]) (*connect.Response[atollv1.PutProfileResponse], error) {
	r := req.Msg
	spec, err := specFrom(r.GetSpec())
	if err == nil {
		err = spec.CheckPart()
	}
	if err != nil {
		return nil, fmt.Errorf("profile %q: %w", r.GetName(), err)
	}
	p, err := s.Profiles.Put(r.GetName(), r.GetSource(), r.GetSpec(), profile.PutOptions{Create: r.GetCreate(), Replaces: r.GetReplaces()})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.PutProfileResponse{Profile: profileTo(p)}), nil
}

func (s *profiles) Get(_ context.Context, req *connect.Request[atollv1.GetProfileRequest]) (*connect.Response[atollv1.GetProfileResponse], error) {
	p, err := s.Profiles.Get(req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.GetProfileResponse{Profile: profileTo(p)}), nil
}

func (s *profiles) List(context.Context, *connect.Request[atollv1.ListProfilesRequest]) (*connect.Response[atollv1.ListProfilesResponse], error) {
	all, err := s.Profiles.List()
	if err != nil {
		return nil, err
	}
	res := &atollv1.ListProfilesResponse{}
	for _, p := range all {
		res.Profiles = append(res.Profiles, profileTo(p))
	}
	return connect.NewResponse(res), nil
}

func (s *profiles) Remove(_ context.Context, req *connect.Request[atollv1.RemoveProfileRequest]) (*connect.Response[atollv1.RemoveProfileResponse], error) {
	if err := s.Profiles.Remove(req.Msg.GetName()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.RemoveProfileResponse{}), nil
}

// profileTo shows a profile; what may be secret is left out, as it is of a machine.
func profileTo(p profile.Profile) *atollv1.Profile {
	spec := p.Spec
	if spec.GetProvisioning() != nil {
		spec = proto.CloneOf(spec)
		request := requestFrom(spec.GetProvisioning())
		spec.Provisioning = provisioningTo(request.Redacted())
	}
	return &atollv1.Profile{Name: p.Name, Source: p.Source, Spec: spec, CreatedAt: stamp(p.Created), UpdatedAt: stamp(p.Updated)}
}
